"""The documentation is true as far as a machine can tell.

Its commands parse, its files exist, its tables and quotes match the code.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, WrongCommand, check_command, split_lines
from pydantic import BaseModel
from typer.testing import CliRunner

from decay_core import decays
from services.study.file import Budget, Data, Grid, Model, RecipeFields, Resources, Study, Tracking
from services.study.recall_task import Induction, Mqar, Needle

PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLES: dict[str, type[BaseModel]] = {
    "The study": Study,
    "`space`": Grid,
    "`recipe`": RecipeFields,
    "`model`": Model,
    "`data`": Data,
    "`recall` of `mqar`": Mqar,
    "`recall` of `induction`": Induction,
    "`recall` of `needle`": Needle,
    "`budget`": Budget,
    "`resources`": Resources,
    "`tracking`": Tracking,
}


def fences(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def written_commands(page: Path) -> list[str]:
    """Fenced sh lines, and words in backticks that are a whole command of ours."""
    fenced = [line for block in fences(page, "sh") for line in split_lines(block)]
    prose = FENCE.sub("", page.read_text())
    inline = re.findall(r"`((?:decay|make|ray|mlflow) [a-z][^`]*)`", prose)
    return fenced + [line for line in inline if line not in BARE]


# Names of commands in running text, without the arguments they need.
BARE = {
    f"decay {name}" for name in ("plan", "diff", "run", "resume", "status", "report", "submit", "clean", "export")
} | {"ray job submit", "ray job stop", "ray start", "mlflow server"}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_would_be_understood(page):
    made: set[str] = set()
    for line in written_commands(page):
        check_command(line, made)


def test_the_documentation_shows_commands_of_every_kind():
    kinds = {check_command(line, {"my-study.yaml"}) for page in PAGES for line in written_commands(page)}
    assert {"decay", "ray", "mlflow", "make", "kubectl", "docker", "files"} <= kinds


@pytest.mark.parametrize(
    "line",
    [
        "decay run tune_spaces/smoke.yaml --workers 2",
        "decay run tune_spaces/gone.yaml",
        "decay run tune_spaces/smoke.yaml --storage /tmp/elsewhere",
        "decay train tune_spaces/smoke.yaml",
        "ray job submit --nowhere -- python -m services.cli run tune_spaces/smoke.yaml",
        "ray job submit --working-dir . -- python -m services.cli run tune_spaces/smoke.yaml --workers 2",
        "mlflow server --allowed-host localhost",
        "make everything",
        "kubectl apply -f cluster/gone.yaml",
        "rm -rf /",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises(WrongCommand):
        check_command(line)


SPACES = sorted((ROOT / "tune_spaces").rglob("*.yaml"))
STUDIES = [path for path in SPACES if isinstance(yaml.safe_load(path.read_text()), dict)]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_file_can_be_planned_and_fits_its_budget(study):
    from services.cli import app

    answer = CliRunner().invoke(app, ["plan", str(study)])
    assert answer.exit_code == 0, answer.output
    assert f"plan of {yaml.safe_load(study.read_text())['name']}" in answer.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    prose = FENCE.sub("", page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)#]+)", prose) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).resolve().exists()]
    assert not missing


def test_the_readme_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


def test_agents_md_is_at_most_100_lines():
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) <= 100


def test_study_file_page_has_exactly_the_keys_and_defaults_of_the_models():
    page = (ROOT / "docs" / "study-file.md").read_text()
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(TABLES)
    for title, model in TABLES.items():
        rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", sections[title], re.MULTILINE)
        assert rows == [(name, _default(model, name)) for name in model.model_fields], title


def _default(model: type[BaseModel], name: str) -> str:
    """A key's default as the page spells it: JSON in backticks, plain words unquoted, or "required"."""
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        assert field.default == type(field.default)(), "a block that is left out has its keys' defaults"
        return "`{}`"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def test_refusals_quoted_in_troubleshooting_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    files = [file for folder in ("services", "decay_core") for file in (ROOT / folder).rglob("*.py")]
    # literals that Python joins are one text in a message: a closing quote, a line break and an opening quote vanish
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    assert len(quoted) > 30
    assert [text for text in quoted if text not in code] == []


def test_pages_name_only_decays_positions_and_keys_that_exist():
    for page in PAGES:
        text = page.read_text()
        for path in re.findall(r"`((?:decay_core|services|tests|tune_spaces|kernels|cluster|docker)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for section, key in re.findall(r"`(recipe|data|model|budget|resources|tracking)\.(\w+)`", text):
            assert key in TABLES[f"`{section}`"].model_fields, f"{page.name}: {section}.{key}"


def test_yaml_examples_are_parts_of_a_study():
    for page in PAGES:
        for block in fences(page, "yaml"):
            for key, value in yaml.safe_load(block).items():
                TABLES[f"`{key}`"].model_validate(value)


def test_the_example_of_a_new_decay_runs(tmp_path, monkeypatch):
    """The page's file, put into a folder of decays, trains a model of nano size for one forward and backward."""
    import torch

    from decay_core.design import DesignPoint
    from decay_core.model import ModelConfig, build_model
    from decay_core.sizes import get_size

    (example,) = fences(ROOT / "docs" / "add-a-decay.md", "python")
    (tmp_path / "my_decay.py").write_text(example)
    monkeypatch.setattr(decays, "__path__", [*decays.__path__, str(tmp_path)])
    decays._registry.cache_clear()
    try:
        config = ModelConfig(point=DesignPoint(decay="my_decay"), size=get_size("nano"), vocab_size=300)
        model = build_model(config, seed=1)
        tokens = torch.arange(64).reshape(1, 64)
        loss = model(tokens, tokens)
        loss.backward()
        assert torch.isfinite(loss) and model.blocks[0].mixer.decay.offset.grad is not None
    finally:
        decays._registry.cache_clear()
        sys.modules.pop("decay_core.decays.my_decay", None)
