"""How many parameters every run of the paper has, or every trial of a study, counted on the model that would be trained.

Nothing is looked up and no formula is used: the class that trains is built without memory and its parameters are summed. A run
of the paper is counted in the form that was run; where that form is refused for its size, in the form of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from decay_core.design import Refusal
from decay_core.model import ModelConfig, count_parameters
from decay_core.sizes import get_size
from services.study.file import Study
from services.study.plan import make_plan, vocabulary
from services.study.published import AXES, Row, runs

PAPER_HEADER = (*AXES, "params")
STUDY_HEADER = ("study", "trial", "id", "size", "params")
PAPER_TOKENIZER = "gpt2"


def paper_counts() -> list[tuple[str, ...]]:
    """A line of PAPER_HEADER for each run, in the order of the paper's tables."""
    return [(*(row.columns[axis] for axis in AXES), str(count_run(row))) for row in runs()]


def study_counts(studies: Iterable[Study]) -> list[tuple[str, ...]]:
    """A line of STUDY_HEADER for each trial. Raises StudyError as `make_plan` does."""
    return [
        (study.name, trial.name, trial.id, trial.size, str(trial.parameters))
        for study in studies
        for trial in make_plan(study).trials
    ]


def count_run(row: Row) -> int:
    """The parameters of one run of the paper."""
    text = ModelConfig(point=row.point, size=get_size(row.size), vocab_size=vocabulary(PAPER_TOKENIZER))
    as_run = replace(text, point=replace(row.point, form="as_run"))
    try:
        return count_parameters(as_run)
    except Refusal:
        return count_parameters(text)
