"""Commands as documentation and manifests write them, checked against what would parse them without running them."""

from __future__ import annotations

import functools
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[2]
STORAGES = ("/shared/runs", "runs")  # what the documentation calls storage
SYSTEM = {"source", "export", "cp", "cd", "sh", "srun", "env", "wget", "pg_isready"}
KUBECTL, COMPOSE = {"apply"}, {"up", "exec"}


class WrongCommand(AssertionError):
    """A written command that would not work: the command and why."""


def split_lines(block: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and blank lines left out."""
    joined = block.replace("\\\n", " ")
    return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def check_command(line: str, known_files: set[str] | None = None) -> str:
    """Checks one command and returns its kind, such as "decay" or "ray". Raises WrongCommand; unknown commands too.

    `known_files` collects files that earlier commands made.
    """
    known = set() if known_files is None else known_files
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    name = Path(words[0]).name
    if words[:3] == ["python", "-m", "services.cli"]:
        return _decay(words[3:], line, known)
    if words[1:3] == ["-m", "pytest"]:
        return _files(words[3:], line)
    checks = {"decay": _decay, "ray": _ray, "mlflow": _mlflow}
    if name in checks:
        return checks[name](words[1:], line, known)
    if name == "make":
        return _make(words[1:], line)
    if name == "cp":
        known.add(words[2])
        return _files(words[1:2], line)
    if name == "sbatch":
        return _files([word for word in words[1:] if word not in STORAGES], line)
    if name in ("kubectl", "docker"):
        return _deploy(name, words[1:], line, known)
    if name in SYSTEM:
        return name
    raise WrongCommand(f"{line!r}: nothing here knows how to check {name!r}")


def _decay(words: list[str], line: str, known: set[str]) -> str:
    from services.cli import app

    group = typer.main.get_command(app)
    if words == ["--help"]:
        return "decay"
    commands = group.commands  # type: ignore[attr-defined]
    if not words or words[0] not in commands:
        raise WrongCommand(f"{line!r}: decay has no such command; it has {', '.join(commands)}")
    params = _parse(commands[words[0]], words, line)
    study, storage = params.get("study_file"), params.get("storage")
    if study is not None and str(study) not in known and not in_checkout(str(study)).is_file():
        raise WrongCommand(f"{line!r}: there is no {study}")
    if storage is not None and storage not in STORAGES:
        raise WrongCommand(f"{line!r}: the documentation calls storage {STORAGES[0]}, not {storage}")
    return "decay"


def in_checkout(path: str) -> Path:
    """Where a file lies in this checkout; the image has the checkout at /app."""
    return ROOT / path.removeprefix("/app/")


def _parse(command: Any, words: list[str], line: str) -> dict[str, Any]:
    """Parses without running. Raises WrongCommand with the parser's complaint."""
    try:
        return dict(command.make_context(words[0], list(words[1:])).params)
    except Exception as error:  # typer carries its own copy of click, so the classes are not click's
        message = getattr(error, "message", None)
        raise WrongCommand(f"{line!r}: {message or type(error).__name__}") from error


def _ray(words: list[str], line: str, known: set[str]) -> str:
    command, names = ray_group(), list(words)
    path = []
    while hasattr(command, "commands"):
        if not names or names[0] not in command.commands:
            raise WrongCommand(f"{line!r}: ray has no command {' '.join([*path, *names[:1]])!r}")
        path.append(names.pop(0))
        command = command.commands[path[-1]]
    params = _parse(command, [path[-1], *names], line)
    if path == ["job", "submit"]:
        check_command(shlex.join(params["entrypoint"]), known)
    if path == ["up"] and not in_checkout(str(params["cluster_config_file"])).is_file():
        raise WrongCommand(f"{line!r}: there is no {params['cluster_config_file']}")
    return "ray"


@functools.cache
def ray_group() -> Any:
    """Ray's command line as a click group, with its jobs."""
    from ray.scripts.scripts import cli

    return cli


@functools.cache
def _mlflow_group() -> Any:
    with warnings.catch_warnings():  # MLflow's own imports warn
        warnings.simplefilter("ignore")
        from mlflow.cli import cli

    return cli


def _mlflow(words: list[str], line: str, known: set[str]) -> str:
    command = _mlflow_group().get_command(None, words[0]) if words else None  # which knows that `ui` is `server`
    if command is None:
        raise WrongCommand(f"{line!r}: mlflow has no command {words[:1]}")
    # parsing would run MLflow's callbacks, which look for a store: option names are compared instead
    options = {option for param in command.params for option in param.opts}
    given = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    unknown = [option for option in given if option not in options]
    if unknown:
        raise WrongCommand(f"{line!r}: mlflow {words[0]} has no {', '.join(unknown)}")
    return "mlflow"


@functools.cache
def make_targets() -> frozenset[str]:
    """The targets of the Makefile that a person types."""
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)
    assert declared is not None
    return frozenset(declared[1].split()) & frozenset(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


def _make(words: list[str], line: str) -> str:
    targets = [word for word in words if "=" not in word]
    unknown = set(targets) - make_targets()
    if unknown or not targets:
        raise WrongCommand(f"{line!r}: make has no target {', '.join(sorted(unknown)) or '(none given)'}")
    return "make"


def _files(words: list[str], line: str) -> str:
    for word in words:
        if not word.startswith("-") and not (ROOT / word).exists():
            raise WrongCommand(f"{line!r}: there is no {word}")
    return "files"


def _deploy(name: str, words: list[str], line: str, known: set[str]) -> str:
    """kubectl apply -f FILE; docker compose -f FILE up|exec. The programs themselves are not here to ask."""
    words = words[1:] if name == "docker" and words[:1] == ["compose"] else words
    if "-f" not in words or not (ROOT / words[words.index("-f") + 1]).is_file():
        raise WrongCommand(f"{line!r}: expected -f with a file of this repository")
    verbs = KUBECTL if name == "kubectl" else COMPOSE
    verb = next((word for word in words if word in verbs), None)
    if verb is None:
        raise WrongCommand(f"{line!r}: expected one of {', '.join(sorted(verbs))}")
    if verb == "exec":
        check_command(shlex.join(words[words.index(verb) + 2 :]), known)
    return name
