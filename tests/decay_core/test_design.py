"""Design points refuse what makes no sense, in one line that names the nearest point that does."""

import json
import re
from collections import Counter

import pytest
from design_points import INVALID, VALID, every_point

from decay_core import decays
from decay_core.design import DesignPoint, Misspelt, Refusal
from decay_core.model import ModelConfig
from decay_core.objection import KINDS
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
        ({"decay": "mamba2", "position": "rope"}, "shift invariance", "mamba2-paired-rope"),
        ({"decay": "mamba2", "position": "rope_half"}, "shift invariance", "mamba2-paired-rope_half"),
        ({"decay": "gla", "position": "lrpe_half", "form": "as_run"}, "one name is enough", "gla-vector-lrpe_half"),
        ({"decay": "gla", "transition": "delta", "share": True}, "normalises its key", "gla-vector-delta"),
        (
            {"decay": "gla", "granularity": "scalar", "transition": "delta", "position": "rope", "form": "as_run"},
            "none of the paper's runs",
            "gla-scalar-rope-delta",
        ),
        ({"decay": "gla", "transition": "softmax"}, "no state that could decay", "gla-vector"),
        ({"decay": "none", "transition": "softmax"}, "has no vector form", "softmax"),
        ({"decay": "gla", "write": "beta"}, "transition diagonal has no choice of write (given beta)", "gla-vector"),
        (
            {"decay": "gla", "transition": "delta", "write": "half"},
            "knows no write 'half', only beta and plain",
            "gla-vector-delta",
        ),
        ({"decay": "gla", "head_dim": 0}, "head_dim must be at least 1", "gla-vector"),
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


def test_refusals_say_of_which_kind_they_are():
    assert {refusal_of(**point.to_dict()).kind for point in INVALID} <= set(KINDS)
    assert refusal_of(decay="mamba2", position="rope").kind == "mathematical"
    assert refusal_of(decay="mamba2_no_a", share=True, form="as_run").kind == "scope"


def test_a_head_dim_that_is_no_width_is_an_error_and_not_a_finding():
    assert all(isinstance(refusal_of(decay="gla", head_dim=wrong), Misspelt) for wrong in (0, -64, True))


def test_unknown_decay_lists_the_known_ones_and_the_closest():
    text = str(refusal_of(decay="manba2"))
    assert "did you mean mamba2?" in text and "simple_decay" in text and "lightnet" in text


@pytest.mark.parametrize("axis", ["position", "granularity", "transition", "form"])
def test_unknown_word_on_another_axis_is_refused_with_the_known_words(axis):
    assert f"unknown {axis} 'nope'" in str(refusal_of(decay="gla", **{axis: "nope"}))


def test_every_invalid_point_names_a_valid_point_of_the_same_decay():
    valid = {point.name: point for point in VALID}
    for point in INVALID:
        with pytest.raises(Refusal) as caught:
            point.check()
        assert valid[caught.value.nearest].decay == point.decay, point


def test_the_grid_has_as_many_valid_points_as_the_rules_allow():
    positions = {"none", "rope", "rope_half", "lrpe", "lrpe_half", "tpe"}
    free = positions - {"rope", "rope_half"}  # encodings that go with a free decay per channel
    expected = Counter()
    for decay in decays.names():
        vector = "vector" in decays.get(decay).granularities
        ablation = decay.startswith("mamba2_")
        published = {("scalar", False): positions}
        as_run = {("scalar", False): positions - {"lrpe_half"}}
        if vector:
            published |= {("paired", False): positions, ("vector", False): free, ("vector", True): free}
            as_run |= {("paired", False): positions - {"rope", "lrpe_half"}, ("vector", False): free - {"lrpe_half"}}
            as_run |= {} if ablation else {("vector", True): free - {"lrpe_half"}}
        expected["diagonal"] += sum(len(found) for found in (*published.values(), *as_run.values()))
        unshared = [found for (_, share), found in published.items() if not share]
        expected["delta"] += sum(len(found) for found in unshared) + len(unshared)  # as run without a position alone
    expected["softmax"] = len(positions) + len(positions - {"lrpe_half"})
    assert Counter(point.transition for point in VALID) == expected


def test_names_are_unique_and_safe_in_a_file_system():
    names = [point.name for point in VALID]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_.-]+", name) for name in names)


def test_names_spell_only_what_is_not_the_default():
    assert DesignPoint(decay="mamba2").name == "mamba2-vector"
    assert DesignPoint(decay="simple_decay", p=0.99, granularity="scalar").name == "simple_decay_p0.99-scalar"
    assert DesignPoint(decay="gla", share=True, form="as_run").name == "gla-vector-share-as_run"
    llama = DesignPoint(decay="none", granularity="scalar", position="rope", transition="softmax")
    assert llama.name == "softmax-rope"
    dplr = DesignPoint(decay="sigmoid", transition="delta", write="plain", head_dim=64, form="as_run")
    assert dplr.name == "sigmoid-vector-delta-dh64-plain-as_run"


def test_points_survive_json():
    for point in (*every_point(), DesignPoint(decay="gla", transition="delta", write="plain", head_dim=64)):
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
    with pytest.raises(ValueError, match=r"known sizes: nano, micro, mini, 160M, 410M, 1\.45B, 3B, 7B, 13B"):
        get_size("70B")
    assert all(size.d_model == size.heads * size.head_dim for size in SIZES.values())
