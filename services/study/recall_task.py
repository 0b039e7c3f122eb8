"""Recall tasks: what a study file may ask a generator for instead of text, and what each needs of a sequence.

A task writes tokens without a tokenizer, so its vocabulary is its own. Every sequence of a task has the same number of answers:
the mean over micro-batches, ranks and batches is then the mean over answers. A key that a task does not read is refused.

Source: multi-query associative recall is that of Zoology (arXiv 2312.04927), the induction task that of H3 (arXiv 2212.14052).
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

LARGEST_VOCABULARY = 1 << 20
MOST_EXAMPLES = 1 << 40

Count = Annotated[int, Field(ge=1, le=LARGEST_VOCABULARY)]
Examples = Annotated[int, Field(ge=1, le=MOST_EXAMPLES)]


class TaskError(ValueError):
    """A task that cannot be generated as asked for; the message is one line."""


class Task(BaseModel):
    """What all tasks share. `about` is one sentence for reports; the numbers of examples do not change what an example is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
    name: ClassVar[str]
    about: ClassVar[str]

    vocab_size: int = Field(256, ge=4, le=LARGEST_VOCABULARY)
    train_examples: Examples = 100_000
    held_out_examples: Examples = 1_000

    @property
    def answers(self) -> int:
        """Answers in every sequence."""
        raise NotImplementedError

    @property
    def answer_tokens(self) -> int:
        """How many tokens can be an answer; each is equally likely."""
        raise NotImplementedError

    @property
    def shortest(self) -> int:
        """Tokens that a sequence needs at least."""
        raise NotImplementedError


class _Pairs(Task):
    """A task with key-value pairs, of which some are asked for; `queries` None asks for every pair."""

    pairs: Count
    queries: Count | None = None

    @property
    def answers(self) -> int:
        return self.pairs if self.queries is None else self.queries

    @property
    def answer_tokens(self) -> int:
        raise NotImplementedError

    @model_validator(mode="after")
    def _enough_of_each(self) -> _Pairs:
        if self.answers > self.pairs:
            raise ValueError(f"queries {self.answers} of {self.pairs} pairs: a key is asked for once; lower queries")
        if self.pairs > self.answer_tokens:
            raise ValueError(
                f"pairs {self.pairs} need as many keys and values, vocab_size {self.vocab_size} has {self.answer_tokens} "
                "of each; raise vocab_size or lower pairs"
            )
        return self


class Mqar(_Pairs):
    """Key-value pairs first, then queries among random tokens, most of them soon after the pairs (a power law)."""

    name = "mqar"
    about = "multi-query associative recall: key-value pairs, then keys among random tokens, each to be answered by its value"

    pairs: Count = 16
    power: float = Field(0.01, gt=0, le=10)

    @property
    def answer_tokens(self) -> int:
        return self.vocab_size // 2

    @property
    def shortest(self) -> int:
        return 2 * self.pairs + 2 * self.answers


class Induction(Task):
    """Random tokens, in them a marker and a token; the sequence ends in the marker again, and the token is the answer."""

    name = "induction"
    about = "the token that followed a marker is the answer when the marker comes again at the end"

    @property
    def answers(self) -> int:
        return 1

    @property
    def answer_tokens(self) -> int:
        return self.vocab_size - 1

    @property
    def shortest(self) -> int:
        return 3


class Needle(_Pairs):
    """Key-value pairs at random depths of a long filler; the sequence ends in the keys that are asked for."""

    name = "needle"
    about = "key-value pairs at any depth of random filler, asked for at the end"

    pairs: Count = 1

    @property
    def answer_tokens(self) -> int:
        return self.vocab_size // 4

    @property
    def shortest(self) -> int:
        return 2 * self.pairs + self.answers


TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Mqar, Induction, Needle)}


def read_task(source: str, values: Any) -> Task | None:
    """The task called `source` with the keys `values` (None: all defaults), or None where `source` is text.

    Raises TaskError, one line that names the key.
    """
    kind = TASKS.get(source)
    if kind is None:
        if values is not None:
            raise TaskError(f"source {source!r} is text; leave recall out, or name a task as source: {', '.join(TASKS)}")
        return None
    if isinstance(values, kind):
        return values
    if not isinstance(values, dict | None):
        raise TaskError(f"takes keys of the task {source}, such as {{vocab_size: 256}}; correct it in the file")
    try:
        return kind.model_validate(values or {})
    except ValidationError as error:
        raise TaskError(_first_problem(kind, error)) from error


def check_length(task: Task, seq_len: int) -> None:
    """Raises TaskError where a sequence of `seq_len` tokens does not hold the task."""
    if seq_len < task.shortest:
        raise TaskError(
            f"recipe.seq_len {seq_len} is too short: a sequence of {task.name} with this data.recall takes at least "
            f"{task.shortest} tokens; raise seq_len or ask for less"
        )


def _first_problem(kind: type[Task], error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = sorted(kind.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its keys: {', '.join(known)}"
        return f"{kind.name} has no key {key!r}; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, given {problem['input']!r:.60}; correct it in the file" if key else message
