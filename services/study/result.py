"""What one finished trial says, and what a whole study says about itself, as files that can be read back.

Surprising here:

* A not-a-number is refused, when written and when read. A trial whose loss is NaN has failed: it has a reason, not a
  result.
* λ may be above 1 (a constant decay with a shifted layer index in the authors' code) and exactly 0 or 1; a negative λ
  is refused.
* The decay profile is the paper's figure: one forward pass over a fixed text, all positions and channels of a layer,
  once with the weights before the first step and once with the final ones.

Source: paper arXiv 2509.05282, the figures of median decay per layer; the loss is in nats per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.study.storage import write_atomically

Lambda = Annotated[float, Field(ge=0.0)]
Nats = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PointValue = str | bool | int | float | None

POINT_KEYS = frozenset({"decay", "p", "granularity", "share", "position", "form"})


class UnreadableResult(ValueError):
    """A result or summary that cannot be read: one line with what, where and what to do."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """The record as indented JSON ending in a newline; the same record always gives the same text."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "the given text") -> Self:
        """Read a record back. Raises UnreadableResult naming `where` and the first wrong field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UnreadableResult(_one_line(cls.__name__, where, error)) from error


class LayerProfile(_Record):
    """The distribution of λ (dimensionless) in one layer, over all positions and channels of a fixed text."""

    layer: Annotated[int, Field(ge=1)]
    median: Lambda
    p25: Lambda
    p75: Lambda
    mean: Lambda
    min: Lambda
    max: Lambda

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.median <= self.max or self.p25 > self.p75:
            raise ValueError(f"layer {self.layer}: min, quartiles, median and max of λ are not in order")
        return self


class TrialResult(_Record):
    """What a finished trial measured.

    Losses and `unigram_entropy` are nats per token; `wall_s` is seconds; `tokens` counts tokens trained on.
    `unigram_entropy` is the entropy of the held-out tokens' frequencies: the loss of a model that knows only those.
    `published_loss` is what the paper prints for the point at this size; reports add it, nothing measures it.
    The accuracies are of recall tasks: the share of held-out answers that are the likeliest token, and of sequences with no
    wrong answer. `state_size` counts the numbers that the model keeps of one sequence after `seq_len` tokens.
    `device` is "cpu" or the GPU's name; `varied` what the study's `vary` set in the recipe; `mechanism` the SHA-256 of every
    file that the forward pass is made of; `kernels` which implementations computed the recurrences, a line each; `world_sizes`
    the numbers of ranks that trained it, one after the other (`world_size` is the last). Results of earlier releases have none
    of the five.
    """

    trial_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    method: Annotated[str, Field(min_length=1)]
    point: dict[str, PointValue]
    size: Annotated[str, Field(min_length=1)]
    seed: int
    parameters: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    held_out_loss: Nats
    train_loss_last_100: Nats
    published_loss: Nats | None = None
    unigram_entropy: Nats
    vocab_size: Annotated[int, Field(ge=1)]
    tokens_per_second: Annotated[float, Field(ge=0.0)]
    wall_s: Annotated[float, Field(ge=0.0)]
    decay_profile: tuple[LayerProfile, ...]
    initial_decay_profile: tuple[LayerProfile, ...]
    weights_sha256: str
    order_hash: str
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    mlflow_run_id: str | None = None
    bits_per_byte: Annotated[float, Field(ge=0.0)] | None = None
    held_out_accuracy: Share | None = None
    held_out_sequence_accuracy: Share | None = None
    state_size: Annotated[int, Field(ge=0)] | None = None
    device: str = ""
    varied: dict[str, Any] = Field(default_factory=dict)
    mechanism: dict[str, str] = Field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    world_sizes: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        missing = sorted(POINT_KEYS - self.point.keys())
        if missing:
            raise ValueError(f"point lacks {', '.join(missing)}")
        for label, profile in (("decay", self.decay_profile), ("initial_decay", self.initial_decay_profile)):
            if [p.layer for p in profile] != list(range(1, len(profile) + 1)):
                raise ValueError(f"{label}_profile must list the layers 1, 2, … in order")
        if len(self.decay_profile) != len(self.initial_decay_profile):
            raise ValueError("decay_profile and initial_decay_profile differ in their number of layers")
        return self


class Omission(_Record):
    """A trial or design point that has no result, and why."""

    name: Annotated[str, Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]


class StudySummary(_Record):
    """What a study asked and on what data, and which of its trials have no result.

    `n_trials` counts the trials that were planned: refused points are not among them.
    """

    name: Annotated[str, Field(min_length=1)]
    question: str
    data: str
    tokenizer: str
    held_out_tokens: Annotated[int, Field(ge=0)]
    unigram_entropy: Nats
    tracking_uri: str | None = None
    n_trials: Annotated[int, Field(ge=0)]
    n_finished: Annotated[int, Field(ge=0)]
    failed: tuple[Omission, ...] = ()
    unfinished: tuple[Omission, ...] = ()
    refused: tuple[Omission, ...] = ()

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        named = self.n_finished + len(self.failed) + len(self.unfinished)
        if named > self.n_trials:
            raise ValueError(f"{named} trials finished, failed or unfinished, but only {self.n_trials} were planned")
        return self

    @property
    def n_failed(self) -> int:
        """How many trials ended without a result."""
        return len(self.failed)

    @property
    def n_refused(self) -> int:
        """How many design points were refused before any trial was planned."""
        return len(self.refused)

    @property
    def n_unnamed(self) -> int:
        """How many planned trials are neither finished, failed nor named as unfinished."""
        return self.n_trials - self.n_finished - len(self.failed) - len(self.unfinished)


def write_record(path: Path, record: TrialResult | StudySummary) -> None:
    """Write the record as JSON at `path`, making its folder: a reader sees the old file or the new, never a part."""
    write_atomically(path, record.to_json().encode())


def read_result(path: Path) -> TrialResult:
    """The trial's result at `path`. Raises UnreadableResult (content) or OSError (no such file)."""
    return TrialResult.from_json(path.read_bytes(), where=str(path))


def read_summary(path: Path) -> StudySummary:
    """The study's summary at `path`. Raises UnreadableResult (content) or OSError (no such file)."""
    return StudySummary.from_json(path.read_bytes(), where=str(path))


def _one_line(kind: str, where: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the record"
    message = " ".join(first["msg"].split())
    return f"{kind} in {where}: {field}: {message}; run the trial again or remove this file"
