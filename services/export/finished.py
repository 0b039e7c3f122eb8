"""Which trial a person means, and all that its export needs: found in a study's storage, checked, refused in one line.

What is surprising: the weights are summed up and compared with the result before they travel, and the code that computes
with them is today's. Files of it that have changed since the trial was trained are named on the card.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from decay_core.model import ModelConfig
from services.data.token_cache import open_cache
from services.export.folder import WEIGHTS
from services.export.modelling_code import ExportError
from services.study.file import Study
from services.study.ledger import Ledger
from services.study.manifest import Manifest, read_manifest
from services.study.mechanism import mechanism_code
from services.study.outcome import result_of
from services.study.plan import Trial, make_plan
from services.study.result import TrialResult
from services.study.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text that a trial read: its tokenizer, and the licence of the source as the token cache states it."""

    tokenizer: Tokenizer
    licence: str


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished trial; `weights` is a local safetensors file. `text` is None where the study's data is generated; `changed`
    names code that has changed since."""

    study: Study
    trial: Trial
    result: TrialResult
    config: ModelConfig
    manifest: Manifest
    weights: Path
    text: Text | None
    changed: tuple[str, ...]


def find_trial(study: Study, word: str) -> Trial:
    """The trial called `word`, or the only one whose id starts with it. Raises ExportError."""
    trials = make_plan(study).trials
    found = [trial for trial in trials if trial.name == word] or [trial for trial in trials if trial.id.startswith(word)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ExportError(f"{word!r} stands for {len(found)} trials of study {study.name!r}; give more of the id, or the name")
    raise ExportError(f"study {study.name!r} has no trial {word!r}; decay status lists the names and ids")


@contextmanager
def finished(study: Study, word: str) -> Iterator[Finished]:
    """The trial that `word` names, complete; its weights can be read while the context lasts.

    Raises ExportError, StudyError or CacheError: no such trial, not finished, weights or tokens that are not the trial's.
    """
    trial, storage = find_trial(study, word), Storage(study.storage).child(study.name)
    manifest = read_manifest(storage)
    state = Ledger(storage).states([trial.id])[trial.id]
    if manifest is None or state.state != "finished":
        said = f"is {state.state}" if manifest is not None else "has not started"
        raise ExportError(f"trial {trial.name} {said}; only a finished trial can be exported: decay run finishes it")
    result = result_of(storage, trial.id, state)
    assert result is not None
    with storage.local_copy(f"trials/{trial.id}/model") as folder:
        _check_weights(folder / WEIGHTS, result)
        config = _config(folder / "config.json", trial)
        yield Finished(
            study=study,
            trial=trial,
            result=result,
            config=config,
            manifest=manifest,
            weights=folder / WEIGHTS,
            text=_text(manifest, storage),
            changed=_changed(result, config),
        )


def _check_weights(path: Path, result: TrialResult) -> None:
    if not path.is_file():
        raise ExportError(f"weights {path} are gone although the trial is finished; restore them")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != result.weights_sha256:
        raise ExportError(
            f"weights {path} have SHA-256 {digest[:12]}, the result says {result.weights_sha256[:12]}; restore them"
        )


def _config(path: Path, trial: Trial) -> ModelConfig:
    try:
        config = ModelConfig.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read ({error}); restore it") from error
    if config != trial.config:
        raise ExportError(f"{path} describes another model than the trial's; restore it")
    return config


def _text(manifest: Manifest, storage: Storage) -> Text | None:
    """The tokens of the study, at their place or beside the study where storage has moved; None where data is generated."""
    if "tokenizer" not in manifest.data["spec"]:
        return None
    places = [Path(manifest.data["path"])]
    if storage.local_path is not None:
        places.append(storage.local_path.parent / "data" / places[0].name)
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise ExportError(f"the token cache {places[0]} is not on this machine, so there is no tokenizer; export where it is")
    cache = open_cache(place)
    if cache.digest != manifest.data["digest"]:
        raise ExportError(f"token cache {place} holds other tokens than the study was trained on; export where they are")
    return Text(tokenizer=cache.tokenizer(), licence=str(cache.manifest["source"]["licence"]))


def _changed(result: TrialResult, config: ModelConfig) -> tuple[str, ...]:
    """Files of the forward pass that are not what they were; nothing where the result does not say what they were."""
    now, then = mechanism_code(config.point), result.mechanism
    return tuple(sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))) if then else ()
