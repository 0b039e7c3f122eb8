"""What each position encoding promises: its numbers, whether a score depends on the distance alone, and what it costs."""

import formulas
import numpy as np
import pytest
import torch
from design_points import place

from decay_core import positions
from decay_core.design import DesignPoint
from decay_core.kernel_seam import decay_scan
from decay_core.model import ModelConfig, build_model
from decay_core.sizes import Size, get_size

FORMS = ("as_published", "as_run")
WIDTH, LENGTH = 8, 12
TURNING = ("rope", "rope_half", "lrpe", "lrpe_half")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angles_of(encoding, start=0, length=LENGTH):
    return encoding.angles(length, torch.device("cpu"), torch.float64, start)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", positions.names())
def test_encoding_equals_its_formula_in_float64(name, form):
    x, encoding = numbers(2, LENGTH, 3, WIDTH), positions.get(name)(WIDTH, form)
    found = encoding.encode(x, angles_of(encoding)).numpy()
    assert found.shape[-1] == encoding.width
    assert np.abs(found - formulas.encoded(x.numpy(), name, form)).max() <= 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TURNING)
def test_scores_depend_on_the_distance_alone(name, form):
    encoding = positions.get(name)(WIDTH, form)
    q, k = (numbers(1, 1, 1, WIDTH, seed=seed).expand(1, LENGTH, 1, WIDTH) for seed in (0, 1))
    q, k = (encoding.encode(x, angles_of(encoding))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(LENGTH):
        assert torch.allclose(scores.diagonal(-distance), scores[distance, 0], atol=1e-12)


def scanned(name, form, log_decay, start):
    """The recurrence over encoded tokens whose first one stands at position `start`."""
    encoding = positions.get(name)(WIDTH, form)
    q, k = (encoding.encode(numbers(1, LENGTH, 1, WIDTH, seed=seed), angles_of(encoding, start)) for seed in (0, 1))
    widened = encoding.widen_decay(log_decay) if log_decay.dim() == 4 else log_decay
    return decay_scan(q, k, numbers(1, LENGTH, 1, 4, seed=2), widened)[0]


def decays_of(granularity):
    f = numbers(1, LENGTH, 1, {"scalar": 1, "paired": WIDTH // 2, "vector": WIDTH}[granularity], seed=3)
    log_decay = torch.nn.functional.logsigmoid(f + 2)
    return {"scalar": log_decay[..., 0], "paired": torch.cat([log_decay] * 2, -1), "vector": log_decay}[granularity]


CASES = [("none", g, "as_published") for g in ("scalar", "paired", "vector")]
CASES += [(name, g, "as_published") for name in TURNING for g in ("scalar", "paired")] + [("rope", "scalar", "as_run")]
CASES += [(name, "vector", "as_published") for name in ("lrpe", "lrpe_half")]


@pytest.mark.parametrize("name, granularity, form", CASES)
def test_output_does_not_change_when_the_text_is_shifted(name, granularity, form):
    assert DesignPoint(decay="sigmoid", granularity=granularity, position=name, form=form).check() is None
    outputs = [scanned(name, form, decays_of(granularity), start) for start in (0, 5, 300)]
    assert all(torch.allclose(shifted, outputs[0], rtol=0, atol=1e-10) for shifted in outputs[1:])


@pytest.mark.parametrize("name", ["rope", "rope_half"])
def test_rotated_pairs_with_a_free_decay_per_channel_do_change_when_the_text_is_shifted(name):
    """Why those points are refused: the error is not a rounding error."""
    first, shifted = (scanned(name, "as_published", decays_of("vector"), start) for start in (0, 5))
    assert (shifted - first).abs().max() > 0.05 * first.abs().max()


def test_tpe_does_not_change_when_the_text_is_shifted():
    stream = positions.get("tpe").stream_module(2, 3).double()
    with torch.no_grad():
        for seed, parameter in enumerate(stream.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed))
    x = numbers(1, 7, 6)
    shifted = torch.cat([torch.zeros(1, 5, 6, dtype=torch.float64), x], dim=1)
    assert torch.allclose(stream(shifted)[0][:, 5:], stream(x)[0], rtol=0, atol=1e-10)


def test_lightnet_knows_its_absolute_position_without_any_encoding():
    model = build_model(ModelConfig(point=DesignPoint(decay="lightnet"), size=get_size("nano"), vocab_size=9), seed=0)
    tokens, seen = torch.ones(1, 6, dtype=torch.int64), []
    model(tokens, observe=lambda layer, log_decay: seen.append(log_decay))
    assert (seen[0][:, 1:] > seen[0][:, :-1]).all()  # the same token again and again is forgotten more slowly


def test_tpe_starts_at_hidden_states_of_zero_and_the_loss_of_a_uniform_guess():
    config = ModelConfig(point=DesignPoint(decay="gla", position="tpe"), size=get_size("nano"), vocab_size=300)
    model, tokens = build_model(config, seed=0), torch.arange(40).reshape(2, 20)
    assert torch.equal(model(tokens), torch.zeros(2, 20, 512))
    assert model(tokens, tokens).item() == pytest.approx(np.log(512), abs=1e-6)


def test_tpe_starts_with_a_decay_of_one_half_and_64_channels_in_every_head():
    recurrence = positions.get("tpe").stream_module(3, 64).recurrence
    with torch.no_grad():
        recurrence.draw(torch.Generator())
    x = torch.zeros(1, 3, 3, 64, dtype=torch.float64)
    x[:, 0] = 1
    s, _ = recurrence(x, None, False)
    assert torch.allclose(s[0, :, 0, 0], 64 * torch.tensor([1, 0.5, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("layers, allowed", [(2, False), (12, False), (24, True)])
def test_tnl_with_tpe_as_run_grows_beyond_fp32_in_models_of_few_layers(layers, allowed):
    size = Size(name="some", d_model=768, layers=layers, heads=12, glu_dim=64)
    point = DesignPoint(decay="tnl", granularity="scalar", position="tpe", form="as_run")
    config = ModelConfig(point=point, size=size, vocab_size=9)
    if allowed:
        config.check()
        return
    with pytest.raises(ValueError, match="more than fp32 holds") as caught:
        config.check()
    assert caught.value.kind == "kernel" and caught.value.nearest == "tnl-scalar-tpe"


def test_tnl_with_tpe_has_a_decay_above_one_in_its_last_layer_only_as_run():
    from decay_core import decays

    largest = {}
    for form in FORMS:
        point = DesignPoint(decay="tnl", granularity="scalar", position="tpe", form=form)
        shift = positions.get("tpe").layer_shift(form)
        module = decays.get("tnl")(place(point, layer=11, layers=12, heads=12, layer_shift=shift))
        largest[form] = module(torch.zeros(1, dtype=torch.float64))[0].exp().max().item()
    assert largest["as_published"] < 1 and largest["as_run"] == pytest.approx(1.0465, abs=1e-4)
