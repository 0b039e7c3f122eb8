"""The whole model against its formulas in float64, its initial weights, and its parameter counts."""

import math

import formulas
import numpy as np
import pytest
import torch
from design_points import MODELS
from formulas import sigmoid, silu

from decay_core import decays, layers
from decay_core.design import DesignPoint, Refusal
from decay_core.model import DecayLinearTransformer, ModelConfig, build_model
from decay_core.sizes import Size, get_size

SMALL = Size(name="small", d_model=12, layers=3, heads=3, glu_dim=20)


def configured(point, size=SMALL, vocab_size=50, **rest):
    return ModelConfig(point=point, size=size, vocab_size=vocab_size, **rest)


def any_tokens(batch=2, length=37, vocab_size=50, seed=0):
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def shaken(config, seed=0):
    """A model in float64 whose every weight is random, so that no branch is silent."""
    model = build_model(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def norm(x, gain):
    return math.sqrt(x.shape[-1]) * x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-5) * gain


def forward(model, tokens):
    """The model's logits by the formulas of the paper's block, numpy only."""
    config, w = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    point, size = config.point, config.size
    x = w["embedding.weight"][tokens]
    if point.position == "tpe":
        own = [w[f"stream.recurrence.{name}"] for name in ("query", "key", "decay_logit")]
        x = formulas.tpe(x, *own, w["stream.norm.gain"], w["stream.output.weight"])
    for layer in range(size.layers):
        b = f"blocks.{layer}."
        mix = attention if point.transition == "softmax" else mixer
        x = x + mix(w, b + "mixer.", norm(x, w[b + "mixer_norm.gain"]), layer, config)
        y = norm(x, w[b + "glu_norm.gain"])
        x = x + (silu(y @ w[b + "glu.gate.weight"].T) * (y @ w[b + "glu.up.weight"].T)) @ w[b + "glu.down.weight"].T
    return norm(x, w["final_norm.gain"]) @ w["head.weight"].T


def heads_of(point):
    """Heads of a model of SMALL: 3 of width 4, one of width 12 for the delta rule as run (128 is more than the width)."""
    wide = point.transition == "delta" and point.form == "as_run" and point.head_dim is None
    return 1 if wide else 3


def attention(w, m, x, layer, config):
    heads = config.size.heads
    q, k, v = ((x @ w[m + f"{name}.weight"].T).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    q, k = (formulas.encoded(a, config.point.position, "as_published") for a in (q, k))
    o = formulas.attention(q, k, v, config.size.d_model // heads)
    return o.reshape(x.shape) @ w[m + "output.weight"].T


def mixer(w, m, x, layer, config):
    point, size = config.point, config.size
    heads = heads_of(point)
    width = size.d_model // heads

    def split(a):
        return a.reshape(*a.shape[:2], heads, -1)

    q, raw_key = split(silu(x @ w[m + "query.weight"].T)), x @ w[m + "key.weight"].T
    v = split(x @ w[m + "value.weight"].T)
    if point.share:
        f = split(raw_key)
    elif m + "activation.weight" in w:
        f = x @ w[m + "activation.weight"].T
    elif m + "activation.down.weight" in w:
        f = split(x @ w[m + "activation.down.weight"].T @ w[m + "activation.up.weight"].T)
    else:
        f = None
    own = {name.removeprefix(m + "decay."): value for name, value in w.items() if name.startswith(m + "decay.")}
    if "joint_decay.logits" in w:
        own["bound"] = formulas.lower_bounds(w["joint_decay.logits"])[layer]
    if "theta" in own and point.form == "as_published":
        own["theta"] = np.minimum(own["theta"], 0)
    shifted = point.position == "tpe" and point.form == "as_run"
    place = (layer + shifted, size.layers, heads)
    log_decay, shared = formulas.log_decay_and_key(point.decay, point.form, f, own, place)
    k = shared if point.share else split(silu(raw_key))
    if point.transition == "delta":
        k = k / np.sqrt((k**2).sum(axis=-1, keepdims=True) + 1e-5)
    q, k = formulas.encoded(q, point.position, point.form), formulas.encoded(k, point.position, point.form)
    if point.granularity == "scalar":
        log_decay = np.broadcast_to(log_decay, (*x.shape[:2], heads))
    log_decay = formulas.channel_decays(log_decay, point.granularity, k.shape[-1])
    if point.transition == "delta":
        beta = 2 * sigmoid(x @ w[m + "transition.beta.weight"].T)
        plain = point.form == "as_run" and point.granularity != "scalar"
        o = formulas.delta_scan(q, k, v, log_decay, beta, {"beta": True, "plain": False, None: not plain}[point.write])
    else:
        o = formulas.scan(q, k, v, log_decay)
    gate = sigmoid(x @ w[m + "output_gate.down.weight"].T @ w[m + "output_gate.up.weight"].T)
    assert width == v.shape[-1]
    return norm(o.reshape(x.shape) * gate, w[m + "norm.gain"]) @ w[m + "output.weight"].T


UNCONFOUNDED = [
    DesignPoint(decay=decay, granularity=granularity, transition="delta", write=write, head_dim=head_dim, form=form)
    for decay, granularity, write, head_dim, form in (
        ("sigmoid", "vector", "beta", 4, "as_run"),
        ("sigmoid", "vector", "plain", None, "as_published"),
        ("sigmoid", "scalar", "plain", 4, "as_run"),
        ("mamba2", "vector", "beta", None, "as_run"),
    )
]


@pytest.mark.parametrize("point", MODELS + UNCONFOUNDED, ids=lambda point: point.name)
def test_model_equals_its_formulas_in_float64(point):
    model = shaken(configured(point))
    tokens = any_tokens()
    found = model(tokens).detach().numpy()
    assert found.dtype == np.float64
    # Three layers of sums over 37 tokens: rounding of 1e-16 grows to about 1e-13 of the largest logit.
    expected = forward(model, tokens.numpy())
    assert np.abs(found - expected).max() <= 1e-11 * np.abs(expected).max()


def test_scan_by_the_naive_kernel_gives_the_same_model(monkeypatch):
    model, tokens = shaken(configured(DesignPoint(decay="mamba2"))), any_tokens()
    chunked = model(tokens)
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    assert torch.allclose(model(tokens), chunked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["none", "rope"])
def test_logits_do_not_read_later_tokens(position):
    model = build_model(configured(DesignPoint(decay="gla", granularity="scalar", position=position)), seed=0)
    tokens = any_tokens()
    changed = tokens.clone()
    changed[:, 20:] = 0
    assert torch.equal(model(tokens)[:, :20], model(changed)[:, :20])


def test_initial_weights_are_truncated_normal_and_the_glu_starts_silent():
    model = build_model(configured(DesignPoint(decay="gla"), get_size("micro"), 500), seed=1)
    for name, weight in model.named_parameters():
        if name.endswith("gain"):
            assert (weight == 1).all()
        elif name.endswith("glu.down.weight"):
            assert (weight == 0).all()
        else:
            assert weight.abs().max() <= 0.06
            assert weight.std().item() == pytest.approx(0.0197, abs=0.0003)
            assert abs(weight.mean().item()) < 0.001


@pytest.mark.parametrize("form, given, gain", [("as_published", None, 1), ("as_run", None, 0), ("as_run", 0.5, 0.5)])
def test_inner_gain_starts_at_the_forms_value_unless_given(form, given, gain):
    point = DesignPoint(decay="gla", form=form)
    model = build_model(configured(point, inner_gain_init=given), seed=0)
    assert all((block.mixer.norm.gain == gain).all() for block in model.blocks)
    assert all((block.mixer_norm.gain == 1).all() for block in model.blocks)


def test_as_run_start_is_the_embedding_read_by_the_head():
    model = build_model(configured(DesignPoint(decay="gla", form="as_run")), seed=0)
    tokens = any_tokens()
    assert torch.equal(model(tokens), model.head(model.final_norm(model.embedding(tokens))))


def test_same_seed_gives_the_same_bits_and_leaves_the_global_random_state_alone():
    config = configured(DesignPoint(decay="mamba2"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build_model(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].std() > 0)


def test_points_of_one_seed_share_every_weight_that_both_have():
    one, two = (build_model(configured(DesignPoint(decay=d)), seed=0).state_dict() for d in ("mamba2", "gla"))
    common = set(one) & set(two)
    assert "blocks.0.mixer.query.weight" in common and "blocks.2.mixer.activation.up.weight" in common
    assert all(torch.equal(one[name], two[name]) for name in common)
    assert not torch.equal(one["blocks.0.mixer.query.weight"], one["blocks.1.mixer.query.weight"])


def test_training_twice_gives_the_same_bits():
    results = []
    for _ in range(2):
        model = build_model(configured(DesignPoint(decay="lightnet", share=True)), seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            tokens = any_tokens(seed=step)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_first_loss_is_near_the_logarithm_of_the_padded_vocabulary():
    tokens = any_tokens(8, 65, 2000)
    for point in (DesignPoint(decay="mamba2"), DesignPoint(decay="none", granularity="scalar")):
        model = build_model(configured(point, get_size("nano"), 2000), seed=0)
        assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(2048), abs=0.1)


def test_every_parameter_gets_a_finite_gradient():
    for point in MODELS:
        model = build_model(configured(point, inner_gain_init=1.0), seed=0)
        tokens = any_tokens()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
        assert not silent, point.name


def test_loss_ignores_targets_of_minus_100_and_equals_the_logits_cross_entropy():
    model, tokens = shaken(configured(DesignPoint(decay="gla"))), any_tokens()
    targets = tokens.roll(-1, 1)
    targets[:, 30:] = -100
    logits = model(tokens)[:, :30]
    expected = -torch.log_softmax(logits, -1).gather(-1, targets[:, :30, None]).mean()
    assert torch.allclose(model(tokens, targets), expected, rtol=1e-12)


def test_loss_in_slices_equals_the_loss_at_once(monkeypatch):
    tokens = any_tokens()
    results = []
    for at_once in (
        layers.LOGITS_AT_ONCE,
        256 * 10,
    ):  # the padded vocabulary is 256: slices of 10 tokens, the last of 4
        monkeypatch.setattr(layers, "LOGITS_AT_ONCE", at_once)
        model = shaken(configured(DesignPoint(decay="gla")))
        loss = model(tokens, tokens)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*results, strict=True))


def test_bf16_autocast_gives_an_fp32_loss_and_fp32_decays_near_the_fp32_ones():
    model, tokens, seen = (
        build_model(configured(DesignPoint(decay="mamba2"), get_size("nano")), seed=0),
        any_tokens(),
        {},
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens, observe=lambda layer, log_decay: seen.update({layer: log_decay}))
    loss.backward()
    assert loss.dtype == torch.float32 and {x.dtype for x in seen.values()} == {torch.float32}
    assert loss.item() == pytest.approx(model(tokens, tokens).item(), abs=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("point", [p for p in MODELS if p.transition != "softmax"], ids=lambda point: point.name)
def test_observer_sees_every_layer_detached_before_widening(point):
    model, seen = build_model(configured(point), seed=0), []
    model(any_tokens(), observe=lambda layer, log_decay: seen.append((layer, log_decay)))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    heads = heads_of(point)
    channels = {"vector": (12 // heads,), "paired": (6 // heads,), "scalar": ()}[point.granularity]
    shape = (2, 37, heads, *channels) if decays.get(point.decay).reads_input else (heads,)
    assert all(x.shape == shape and not x.requires_grad and x.dtype == torch.float32 for _, x in seen)


def test_parameters_are_read_only_inside_their_own_modules_forward():
    # DeepSpeed ZeRO-3 holds a parameter's values only while its module's forward runs.
    for point in MODELS:
        model = build_model(configured(point), seed=0)
        owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
        for module in owners:
            for parameter in module.parameters(recurse=False):
                parameter.full = parameter.data
                parameter.data = parameter.data.new_full(parameter.shape, torch.nan)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
        with torch.no_grad():
            assert model(any_tokens()).isfinite().all(), point.name


def gather(module, _):
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.full


def release(module, *_):
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.full_like(parameter.full, torch.nan)


def test_model_on_meta_has_no_memory_and_without_a_seed_keeps_shapes():
    config = configured(DesignPoint(decay="mamba2"))
    assert {p.device.type for p in build_model(config, device="meta", seed=0).parameters()} == {"meta"}
    undrawn, drawn = build_model(config), build_model(config, seed=0)
    undrawn.load_state_dict(drawn.state_dict())
    assert torch.equal(undrawn(any_tokens()), drawn(any_tokens()))


def test_invalid_point_cannot_be_built():
    with pytest.raises(Refusal, match="has no vector form"):
        DecayLinearTransformer(configured(DesignPoint(decay="tnl")))
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        configured(DesignPoint(decay="gla"), vocab_size=0)
