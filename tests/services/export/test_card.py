"""The card names the paper's figure where there is one, and whatever a source calls itself, its tables stay tables."""

import dataclasses

import pytest
import yaml
from finished_trial import finish, write_study

from decay_core.design import DesignPoint
from decay_core.model import ModelConfig
from decay_core.sizes import get_size
from services.export.card import model_card
from services.export.finished import finished
from services.study.file import read_study
from services.study.published import published_loss


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    path = write_study(tmp_path_factory.mktemp("card"))
    _, made, _ = finish(path)
    with finished(read_study(path), made.name) as found:
        yield found


def paper_config(**axes):
    return ModelConfig(point=DesignPoint(decay="mamba2", **axes), size=get_size("160M"), vocab_size=50257)


@pytest.mark.parametrize("form", ["as_published", "as_run"])
def test_the_published_loss_of_the_same_point_and_size_is_named_with_its_errata(trial, form):
    config = paper_config(form=form)
    card = model_card(dataclasses.replace(trial, config=config))
    assert f"| 6 | {published_loss(config.point, config.size)} | " in card
    assert "repeated-baseline-small" in card and "prints no result" not in card


def test_a_point_that_the_paper_does_not_print_has_none(trial):
    card = model_card(dataclasses.replace(trial, config=paper_config(granularity="scalar", position="lrpe")))
    assert "prints no result for this point at this size" in card


def test_the_front_matter_can_be_read_and_tables_keep_their_columns(trial):
    data = {**trial.manifest.data, "description": "a | b\nc"}
    card = model_card(dataclasses.replace(trial, manifest=dataclasses.replace(trial.manifest, data=data)))
    assert "a \\| b c |" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert len(tables) > 20 and all(line.endswith("|") for line in tables)
