"""The manifest: what a study was when it started, so that it can be extended but not changed under its trials.

`study.json` holds the resolved study, the ids of its trials, the digest of its data and its start time (the zero of every
metric's time stamp). It is replaced atomically and only ever grows.
"""

from __future__ import annotations

import ast
import hashlib
import io
import time
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.study.file import Study, StudyError
from services.study.mechanism import mechanism_code
from services.study.plan import Plan
from services.study.sealed import seal, unseal
from services.study.secrets import without_password
from services.study.storage import Storage

NAME = "study.json"
ROOT = Path(__file__).parents[2]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
TRAINING = ("decay_core/recipe.py", "services/data/order.py", "services/train/engine.py", "services/train/loop.py")
# What may differ between two runs of one study: growth is judged by trial ids, the rest does not bear on a result's bits.
FREE = {
    "space", "sizes", "seeds", "vary", "match", "budget", "question", "storage", "data.workers", "resources.backend",
    "resources.max_concurrent_trials", "resources.max_failures", "resources.quarantine_after",
    "resources.assumed_gflops_per_worker", "resources.cpus_per_worker", "resources.elastic", "tracking",
}  # fmt: skip
ELASTIC = {"resources.workers", "resources.micro_batch_size"}  # what may differ too where the study says resources.elastic


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`study` as resolved, `trials` id -> name, `data` {digest, path, ...}, `started_ms` (Unix), `tracking` {uri, ids}, `code`
    {file: digest without comments and docstrings} of all that the trials compute with (empty in an early release's manifest).
    """

    study: dict[str, Any]
    trials: dict[str, str]
    data: dict[str, Any]
    started_ms: int
    tracking: dict[str, Any] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)


def read_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a started study, or None. Raises StudyError naming a damaged file; never a silent fresh start."""
    raw = storage.read(NAME)
    if raw is None:
        if storage.list("ledger"):
            raise StudyError(
                f"{storage.root}/{NAME} is gone although the study has a ledger; restore the file, "
                "or move the folder away to start over"
            )
        return None
    try:
        manifest = Manifest(**unseal(raw))
        _check_kinds(manifest)
    except (ValueError, TypeError, RecursionError) as error:
        raise StudyError(
            f"{storage.root}/{NAME} is damaged ({error}); restore it, or move the folder away to start over"
        ) from error
    return manifest


def _check_kinds(manifest: Manifest) -> None:
    for key, kind in (("study", dict), ("trials", dict), ("data", dict), ("started_ms", int), ("tracking", dict),
                      ("code", dict)):  # fmt: skip
        if not isinstance(getattr(manifest, key), kind):
            raise TypeError(f"{key} is no {kind.__name__}")
    if not isinstance(manifest.data.get("digest"), str):
        raise TypeError("data has no digest")


def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Replaces the manifest atomically."""
    storage.write(NAME, seal(manifest.__dict__))


def check_unchanged(old: Manifest, plan: Plan) -> None:
    """Refuses a study file whose started trials would not be what they were.

    Raises StudyError naming the changed keys, or the trials that are no longer in the space.
    """
    before, after = _flat(filled(old.study)), _flat(resolved(plan.study))
    allowed = ELASTIC if plan.study.resources.elastic else set()
    every = (before.keys() | after.keys()) - allowed
    changed = sorted(key for key in every if before.get(key) != after.get(key) and not _free(key))
    if changed:
        said = ", ".join(f"{key} ({before.get(key)} -> {after.get(key)})" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise StudyError(
            f"study {plan.study.name!r} has started with other values of {said}{more}; "
            "change them back, or give the new study another name"
        )
    gone = [name for trial, name in old.trials.items() if trial not in {t.id for t in plan.trials}]
    if gone:
        raise StudyError(
            f"study {plan.study.name!r} has trials that its file no longer names: {', '.join(sorted(gone)[:4])}"
            f"{' ...' if len(gone) > 4 else ''}; a study may grow but not shrink: put them back or use another name"
        )


def next_manifest(
    old: Manifest | None, plan: Plan, data: dict[str, Any], accept_drift: bool = False, idle: bool = False
) -> Manifest:
    """The manifest of this run: the first one, or the old one grown. `idle`: nothing will be trained, code may be new.

    Raises StudyError where the data, its tokenizer or the code are not what they were, unless that is accepted.
    """
    manifest = Manifest(
        study=_without_passwords(resolved(plan.study)),
        trials={trial.id: trial.name for trial in plan.trials},
        data=data,
        started_ms=old.started_ms if old else int(time.time() * 1000),
        tracking=old.tracking if old else {},
        code=old.code if old and idle else code_of(plan),
    )
    found = drift(old, manifest) if old is not None else []
    if found and not accept_drift:
        raise StudyError(
            f"study {plan.study.name!r} would go on with something else than it started with: {'; '.join(found[:3])}"
            f"{' ...' if len(found) > 3 else ''}; restore it, give the new study another name, or say --accept-drift"
        )
    return manifest


def code_of(plan: Plan) -> dict[str, str]:
    """{file: digest of its code} of all that the forward passes of a plan's trials are made of, and of what trains them."""
    code: set[str] = set()
    for point in {trial.point.name: trial.point for trial in plan.trials}.values():
        code |= mechanism_code(point).keys()
    return {name: code_digest((ROOT / name).read_text(encoding="utf-8")) for name in sorted({*code, *TRAINING})}


def code_digest(source: str) -> str:
    """SHA-256 of Python source without what does not run: comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, DOCUMENTED) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
            first, last = body[0].lineno - 1, (body[0].end_lineno or body[0].lineno) - 1
            before, after = lines[first].encode()[: body[0].col_offset], lines[last].encode()[body[0].end_col_offset :]
            if not before.strip() and not after.strip():  # one that shares a line with code stays
                lines[first : last + 1] = [""] * (last + 1 - first)
    return hashlib.sha256("\n".join(line.rstrip() for line in lines if line.strip()).encode()).hexdigest()


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def drift(old: Manifest, new: Manifest) -> list[str]:
    """What is not what it was when the study started, each with its old and new hash. New files are no drift."""
    found = []
    before, after = old.data["digest"], new.data["digest"]
    if before != after:
        found.append(f"data of {new.data['source']} changed: digest was {before[:12]}, is {after[:12]}")
    cut, cuts = str(old.data.get("tokenizer_sha256") or ""), str(new.data.get("tokenizer_sha256") or "")
    if cut and cuts and cut != cuts:
        found.append(f"tokenizer changed: was {cut[:12]}, is {cuts[:12]}")
    for name in sorted(old.code):
        was, now = old.code[name], new.code.get(name)
        if was != now and was != _digest_of_bytes(ROOT / name):
            found.append(f"code {name} changed: was {was[:12]}, is {now[:12] if now else 'gone'}")
    return found


def _digest_of_bytes(path: Path) -> str:
    """What earlier releases noted of a file: the SHA-256 of all of it, comments included."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def resolved(study: Study) -> dict[str, Any]:
    """A study with every default filled in, as JSON values."""
    return dict(study.model_dump(mode="json"))


def _without_passwords(study: dict[str, Any]) -> dict[str, Any]:
    uri = study["tracking"]["uri"]
    tracking = {**study["tracking"], "uri": without_password(uri) if uri else uri}
    return {**study, "storage": without_password(study["storage"]), "tracking": tracking}


def filled(study: dict[str, Any]) -> dict[str, Any]:
    """A study as an earlier release resolved it, with the defaults of the keys that came since."""
    try:
        return resolved(Study.model_validate(study))
    except ValueError:
        return study


def _free(key: str) -> bool:
    return key in FREE or key.split(".")[0] in FREE


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and not prefix:
            flat.update(_flat(item, f"{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat
