"""Exports of several points and of a finished trial, and what a process without this project computes with them."""

from __future__ import annotations

import pytest
import torch
from exported_points import POINTS, Exported, alone, config_of
from finished_trial import finish, shaken, write_study
from safetensors.torch import save_file
from typer.testing import CliRunner

from services.cli import app
from services.export.folder import Export, write_export


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """{name: a model and its export}; the one called `trial` went through the command line."""
    home = tmp_path_factory.mktemp("export")
    folder, models = home / "exports", {}
    for point in POINTS:
        models[point.name] = shaken(config_of(point))
        save_file(models[point.name].state_dict(), home / "bare.safetensors")
        export = Export(config=config_of(point), weights=home / "bare.safetensors", card="A card.\n")
        write_export(export, folder / point.name)
    study = write_study(home)
    _, trial, models["trial"] = finish(study)
    answer = CliRunner().invoke(app, ["export", str(study), trial.id[:6], "--to", str(folder / "trial")])
    assert answer.exit_code == 0, answer.output
    alone("load_alone.py", folder, home / "results.pt", home=home)
    found = torch.load(home / "results.pt", weights_only=False)
    seen = set(found.pop("modules"))
    assert "transformers" in seen and not seen & {"decay_core", "services", "ray", "mlflow", "deepspeed", "datasets"}
    return {name: Exported(model, folder / name, found[name]) for name, model in models.items()}
