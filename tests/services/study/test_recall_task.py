"""A study file may ask for a recall task; what it asks for in vain is refused in one line that names the key."""

import json
from typing import Any

import pytest
import yaml
from small_study import VALID

from services.study.file import Data, Study, StudyError, read_study
from services.study.manifest import resolved
from services.study.plan import make_plan

RECALL = {"source": "mqar", "recall": {"vocab_size": 64, "pairs": 4}}


def study_on(data: dict[str, Any], **recipe: Any) -> Study:
    return Study.model_validate(VALID | {"data": data, "recipe": VALID["recipe"] | recipe})


def test_the_vocabulary_is_the_tasks_and_its_keys_are_part_of_a_trials_id():
    plan, other = make_plan(study_on(RECALL)), make_plan(study_on({"source": "mqar", "recall": {"vocab_size": 64, "pairs": 5}}))
    assert {trial.config.vocab_size for trial in plan.trials} == {64}
    assert plan.trials[0].content["data"] == {"source": "mqar", "recall": {
        "vocab_size": 64, "train_examples": 100_000, "held_out_examples": 1000, "pairs": 4, "queries": None, "power": 0.01,
    }}  # fmt: skip
    assert not {trial.id for trial in plan.trials} & {trial.id for trial in other.trials}


def test_a_default_that_is_written_out_is_the_same_trial():
    written = {"source": "mqar", "recall": {**RECALL["recall"], "queries": None, "power": 0.01}}
    assert [t.id for t in make_plan(study_on(written)).trials] == [t.id for t in make_plan(study_on(RECALL)).trials]


@pytest.mark.parametrize("source", ["mqar", "induction", "needle"])
def test_a_task_without_keys_has_its_defaults_and_reads_back_from_what_is_resolved(source):
    study = study_on({"source": source})
    again = Study.model_validate(json.loads(json.dumps(resolved(study))))
    assert again == study and type(again.data.recall).name == source
    assert len(make_plan(study).trials) == 12


def test_text_says_nothing_of_recall():
    assert "recall" not in Data().model_dump() and "recall" not in resolved(Study.model_validate(VALID))["data"]


@pytest.mark.parametrize(
    ("data", "seq_len", "said"),
    [
        ({"source": "mqar", "recall": {"pares": 3}}, 64, "data.recall: mqar has no key 'pares'; did you mean 'pairs'?"),
        ({"source": "induction", "recall": {"pairs": 2}}, 64, "its keys: held_out_examples, train_examples, vocab_size"),
        ({"source": "mqar", "recall": {"pairs": True}}, 64, "data.recall: pairs: Input should be a valid integer, given True"),
        ({"source": "mqar", "recall": {"power": 0}}, 64, "data.recall: power: Input should be greater than 0, given 0"),
        ({"source": "mqar", "recall": [3]}, 64, "data.recall: takes keys of the task mqar"),
        ({"source": "mqar", "recall": {"pairs": 200}}, 64, "vocab_size 256 has 128 of each; raise vocab_size or lower pairs"),
        ({"source": "needle", "recall": {"pairs": 65}}, 999, "vocab_size 256 has 64 of each"),
        ({"source": "mqar", "recall": {"pairs": 3, "queries": 4}}, 64, "queries 4 of 3 pairs: a key is asked for once"),
        ({"source": "sotu", "recall": {"pairs": 4}}, 64, "source 'sotu' is text; leave recall out, or name a task"),
        ({"source": "mqar", "tokenizer": "bpe-300"}, 64, "data: tokenizer is for text, and the task mqar generates its tokens"),
        ({"source": "mqar"}, 63, "recipe.seq_len 63 is too short: a sequence of mqar with this data.recall takes at least 64"),
        ({"source": "induction"}, 2, "takes at least 3 tokens; raise seq_len or ask for less"),
    ],
)
def test_a_task_that_cannot_be_is_refused_in_one_line(tmp_path, data, seq_len, said):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(VALID | {"data": data, "recipe": VALID["recipe"] | {"seq_len": seq_len}}))
    with pytest.raises(StudyError) as caught:
        make_plan(read_study(path))
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_length_that_varies_must_hold_the_task():
    varied = study_on(RECALL).model_copy(update={"vary": study_on(RECALL).vary.model_copy(update={"seq_len": [64, 15]})})
    with pytest.raises(StudyError, match="seq_len 15 is too short"):
        make_plan(varied)
