"""Design points refuse what makes no sense, in one line that names the nearest point that does."""

import json
import re

import pytest
from design_points import INVALID, VALID, every_point

from decay_core.design import DesignPoint, Refusal
from decay_core.model import ModelConfig
from decay_core.sizes import SIZES, get_size


def refusal_of(**axes):
    with pytest.raises(Refusal) as caught:
        DesignPoint(**axes).check()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "axes, reason, nearest",
    [
        ({"decay": "mamba2", "granularity": "scalar", "share": True}, "sharing needs vector", "mamba2-vector-share"),
        ({"decay": "mamba2", "position": "rope"}, "shift invariance", "mamba2-scalar-rope"),
        ({"decay": "gla", "position": "rope", "form": "as_run"}, "none of the paper's runs", "gla-scalar-rope-as_run"),
        ({"decay": "simple_decay"}, "needs its starting value p", "simple_decay_p0.99-vector"),
        ({"decay": "simple_decay", "p": 1.0}, "strictly between 0 and 1", "simple_decay_p0.99-vector"),
        ({"decay": "hgrn2", "p": 0.9}, "takes no p", "hgrn2-vector"),
        ({"decay": "tnl"}, "has no vector form", "tnl-scalar"),
        (
            {"decay": "mamba2_no_a", "share": True, "form": "as_run"},
            "the public code has no such variant",
            "mamba2_no_a-vector-share",
        ),
    ],
)
def test_refusal_gives_the_reason_and_the_nearest_valid_point(axes, reason, nearest):
    refusal = refusal_of(**axes)
    assert reason in refusal.reason and refusal.nearest == nearest
    assert nearest in str(refusal)


def test_unknown_decay_lists_the_known_ones_and_the_closest():
    text = str(refusal_of(decay="manba2"))
    assert "did you mean mamba2?" in text and "simple_decay" in text and "lightnet" in text


@pytest.mark.parametrize("axis", ["position", "granularity", "form"])
def test_unknown_word_on_another_axis_is_refused_with_the_known_words(axis):
    assert f"unknown {axis} 'nope'" in str(refusal_of(decay="gla", **{axis: "nope"}))


@pytest.mark.parametrize("point", INVALID, ids=repr)
def test_every_invalid_point_names_a_valid_point_of_the_same_decay(point):
    with pytest.raises(Refusal) as caught:
        point.check()
    named = [valid for valid in VALID if valid.name == caught.value.nearest]
    assert len(named) == 1 and named[0].decay == point.decay


def test_the_grid_has_as_many_valid_points_as_the_rules_allow():
    # Eight decays have both granularities: vector, vector shared, scalar, scalar with rope, each in two forms; the
    # three Mamba2 ablations are not shared as run. Four are scalar only: without position and with rope, in two forms.
    assert len(VALID) == 8 * 2 * 4 - 3 + 4 * 2 * 2


def test_names_are_unique_and_safe_in_a_file_system():
    names = [point.name for point in VALID]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_.-]+", name) for name in names)


def test_names_spell_only_what_is_not_the_default():
    assert DesignPoint(decay="mamba2").name == "mamba2-vector"
    assert DesignPoint(decay="simple_decay", p=0.99, granularity="scalar").name == "simple_decay_p0.99-scalar"
    assert DesignPoint(decay="gla", share=True, form="as_run").name == "gla-vector-share-as_run"


@pytest.mark.parametrize("point", list(every_point()), ids=repr)
def test_points_survive_json(point):
    assert DesignPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point


def test_unknown_key_of_a_point_is_refused():
    with pytest.raises(ValueError, match="unknown key 'sharing'"):
        DesignPoint.from_dict({"decay": "gla", "sharing": True})
    with pytest.raises(ValueError, match="'decay' is missing"):
        DesignPoint.from_dict({"p": 0.9})


def test_model_configuration_survives_json():
    config = ModelConfig(point=VALID[0], size=get_size("nano"), vocab_size=300, inner_gain_init=0.5)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.padded_vocab == 512


def test_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match="known sizes: nano, micro, mini, 160M"):
        get_size("7B")
    assert all(size.d_model == size.heads * size.head_dim for size in SIZES.values())
