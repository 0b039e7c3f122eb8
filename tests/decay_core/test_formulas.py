"""Every decay, in every granularity, sharing and form, equals its formula recomputed in float64."""

import formulas
import numpy as np
import pytest
import torch
from design_points import VALID, place

from decay_core import decays

# float64 against float64: sums and logarithms of numbers of order 10, so a few hundred ulps at most.
TOLERANCE = 1e-12
PLAIN = [point for point in VALID if point.position == "none" and point.transition == "diagonal"]


def module_at(point, layer, seed=3):
    """The decay in float64 with parameters moved away from their initial values, and its joint row (or None)."""
    generator = torch.Generator().manual_seed(seed)
    where = place(point, layer)
    kind = decays.get(point.decay)
    module, joint = kind(where), kind.joint_module(where)
    with torch.no_grad():
        for part in filter(None, (module, joint)):
            part.draw(generator)
            part.double()
            for parameter in part.parameters():
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * -0.3)
    return module, None if joint is None else joint


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("point", PLAIN, ids=lambda point: point.name)
def test_decay_equals_its_formula_in_float64(point, layer):
    module, joint = module_at(point, layer)
    f = torch.randn(2, 17, *module.place.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    row = None if joint is None else joint()[layer]
    log_decay, key = module(f, row)
    parameters = {name: value.detach().numpy() for name, value in module.named_parameters()}
    if joint is not None:
        parameters["bound"] = formulas.lower_bounds(joint.logits.detach().numpy())[layer]
        assert np.abs(row.detach().numpy() - parameters["bound"]).max() <= TOLERANCE
    expected, expected_key = formulas.log_decay_and_key(point.decay, point.form, f.numpy(), parameters, (layer, 3, 2))
    assert log_decay.dtype == torch.float64
    assert np.abs(log_decay.detach().numpy() - expected).max() <= TOLERANCE
    assert (key is not None) == point.share
    if point.share:
        assert key.dtype == torch.float64
        assert np.abs(key.detach().numpy() - expected_key).max() <= TOLERANCE


@pytest.mark.parametrize("point", [p for p in PLAIN if p.share and p.form == "as_published"], ids=lambda p: p.name)
def test_published_shared_key_is_one_minus_decay_also_where_fp32_subtraction_gives_zero(point):
    module = decays.get(point.decay)(place(point))
    with torch.no_grad():
        module.draw(torch.Generator().manual_seed(0))
    nearly_one = -22.0 if point.decay.startswith(("mamba2", "lightnet")) else 22.0
    log_decay, key = module(torch.full((1, 3, *module.place.shape), nearly_one), None)
    assert (key > 0).all() and (1 - log_decay.exp() == 0).any()
    wanted = -torch.expm1(log_decay.double())
    assert ((key.double() - wanted).abs() <= 2e-6 * wanted + 1e-45).all()


@pytest.mark.parametrize("point", PLAIN, ids=lambda point: point.name)
def test_decays_stay_fp32_under_bf16_autocast_and_for_bf16_activations(point):
    module, joint = module_at(point, 1)
    module, joint = module.float(), None if joint is None else joint.float()
    f = torch.full((1, 4, *module.place.shape), 7.0, dtype=torch.bfloat16)  # log σ(7) rounds to 0 in bf16
    with torch.autocast("cpu", torch.bfloat16):
        row = None if joint is None else joint()[1]
        log_decay, key = module(f, row)
    plain, plain_key = module(f.float(), row)
    assert log_decay.dtype == torch.float32 and torch.equal(log_decay, plain)
    assert key is None or (key.dtype == torch.float32 and torch.equal(key, plain_key))


@pytest.mark.parametrize("f", [-1e4, -90.0, 0.0, 18.0, 90.0, 1e4])
@pytest.mark.parametrize("point", PLAIN, ids=lambda point: point.name)
def test_extreme_activations_give_no_nan_in_value_or_gradient(point, f):
    module, joint = module_at(point, 1)
    module, joint = module.float(), None if joint is None else joint.float()
    f = torch.full((1, 5, *module.place.shape), f, requires_grad=True)
    log_decay, key = module(f, None if joint is None else joint()[1])
    assert not log_decay.isnan().any() and (log_decay <= 0).all()
    loss = log_decay.clamp(min=-1e6).exp().sum() + (0 if key is None else key.sum())
    if loss.requires_grad:
        loss.backward()
        grads = [x.grad for x in (f, *module.parameters()) if x.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)


def test_hgrn2_floors_rise_from_zero_and_start_at_layer_over_layers():
    joint = decays.get("hgrn2").joint_module(place(PLAIN[0], layers=4))
    with torch.no_grad():
        joint.draw(torch.Generator())
    bounds = joint()
    assert torch.equal(bounds[0], torch.zeros_like(bounds[0]))
    assert torch.allclose(bounds[:, 0].flatten()[:: bounds[0, 0].numel()], torch.arange(4) / 4)


def test_lightnet_forgets_like_t_over_t_plus_one_when_all_logits_are_zero():
    point = next(p for p in PLAIN if p.decay == "lightnet" and p.granularity == "scalar")
    log_decay, _ = decays.get("lightnet")(place(point))(torch.zeros(1, 6, 2))
    t = torch.arange(1, 7)
    assert torch.allclose(log_decay[0, :, 0].exp(), t / (t + 1))


def test_lightnet_shared_state_is_the_running_softmax_average_with_a_virtual_zero_step():
    point = next(p for p in PLAIN if p.decay == "lightnet" and p.share and p.form == "as_published")
    f = torch.randn(1, 9, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = np.random.default_rng(0).normal(size=(1, 9, 2, 4))
    log_decay, key = decays.get("lightnet")(place(point))(f)
    last = np.zeros((1, 9, 2, 4))
    last[:, -1, :, 0] = 1  # reads state row 0 at the last token
    o = formulas.scan(last, key.numpy(), v, log_decay.numpy())[0, -1]
    weight = np.exp(f.numpy())[0, :, :, 0]
    average = (weight[..., None] * v[0]).sum(axis=0) / (1 + weight.sum(axis=0))[..., None]
    assert np.abs(o - average).max() <= TOLERANCE
