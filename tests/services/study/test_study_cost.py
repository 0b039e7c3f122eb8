"""The operations per token are those of the model that trains and of the recurrence as it is defined."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from decay_core import decays, transitions
from decay_core.design import DesignPoint
from decay_core.kernel_seam import decay_scan, delta_scan
from decay_core.model import ModelConfig, build_model, count_parameters
from decay_core.sizes import get_size
from services.study.cost import count_model, fits, flops_per_token

VECTOR = DesignPoint(decay="mamba2")
SCALAR = DesignPoint(decay="mamba2", granularity="scalar")
DELTA = DesignPoint(decay="mamba2", granularity="scalar", transition="delta")
SOFTMAX = DesignPoint(decay="none", granularity="scalar", transition="softmax")
SHARED_WEIGHTS = 2 * (4 * 128**2 + 3 * 128 * 256) + 512 * 128  # two layers of nano: projections, GLU; the head once
GATE = 2 * 2 * 128 * 32  # two layers of a bottleneck one head wide


def nano(point, **changes):
    return ModelConfig(point=point, size=replace(get_size("nano"), **changes), vocab_size=512)


@pytest.mark.parametrize(
    "point, weights, transition",
    [
        # state: 2 layers x 4 heads x 32 x 32 numbers; forward and backward 3 x 5 operations on each, 3 x 7 for delta
        (SCALAR, SHARED_WEIGHTS + GATE + 2 * 128 * 4, 15 * 8192),
        (VECTOR, SHARED_WEIGHTS + GATE + GATE, 15 * 8192),
        (DELTA, SHARED_WEIGHTS + GATE + 2 * 128 * 8, 21 * 8192),
        (replace(SCALAR, position="lrpe"), SHARED_WEIGHTS + GATE + 2 * 128 * 4, 15 * 2 * 8192),
        (replace(VECTOR, head_dim=64), SHARED_WEIGHTS + 4 * GATE, 15 * 2 * 8192),
        # keys and values of the past: 2 layers x 256 numbers a token, 50.5 tokens on average of 100, 3 x 2 operations
        (SOFTMAX, SHARED_WEIGHTS, 6 * 512 * 50.5),
    ],
    ids=str,
)
def test_operations_per_token_are_those_counted_by_hand(point, weights, transition):
    config = nano(point)
    assert count_model(config).multiplied == weights
    assert flops_per_token(config, 100) == 6 * weights + transition


def counted(config, tokens, backend):
    """What torch counts of the real forward and backward: products of matrices alone."""
    model = build_model(config, seed=0)
    text = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
        model(text, text.roll(-1)).backward()
    return counter.get_total_flops()


def test_torch_counts_the_same_for_attention_but_for_the_half_that_the_mask_throws_away():
    config, tokens = nano(SOFTMAX), 64
    linear = 6 * count_model(config).multiplied
    attention = flops_per_token(config, tokens) - linear
    torchs = counted(config, tokens, SDPBackend.MATH) / tokens - linear
    assert torchs == attention * 2 * tokens / (tokens + 1)


@pytest.mark.parametrize("point, within", [(VECTOR, 0.1), (SCALAR, 0.1), (DELTA, 0.15)], ids=str)
def test_torch_counts_nearly_the_same_for_a_diagonal_or_delta_state(point, within, monkeypatch):
    # The chunked scan multiplies inside its chunks what the recurrence does not, and fades without matrix products.
    monkeypatch.setenv("DECAY_KERNEL", "chunked")
    config = nano(point)
    assert counted(config, 128, SDPBackend.MATH) / 128 == pytest.approx(flops_per_token(config, 128), rel=within)


class Arithmetic(TorchDispatchMode):
    """Counts multiplications and additions: one for every number that an elementwise operation gives or a sum takes."""

    done = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mul", "add", "sub"):
            self.done += result.numel()
        elif name == "sum":
            self.done += args[0].numel()
        else:
            assert name not in ("mm", "bmm", "addmm", "baddbmm"), "the definition multiplies no matrices"
        return result


@pytest.mark.parametrize("name", ["diagonal", "delta"])
def test_a_transition_declares_the_operations_of_its_definition(name, monkeypatch):
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    batch, tokens, heads, width = 1, 5, 2, 64
    q, k, v, decay = torch.rand(4, batch, tokens, heads, width).neg()
    run = {"diagonal": lambda: decay_scan(q, k, v, decay), "delta": lambda: delta_scan(q, k, v, decay[..., 0].neg(), decay)}
    with Arithmetic() as arithmetic:
        run[name]()
    per_number = arithmetic.done / (batch * tokens * heads * width * width)
    assert transitions.get(name).operations <= per_number < transitions.get(name).operations + 0.1


def points():
    """A point of every decay, granularity and transition, and of every encoding."""
    for name in decays.names():
        p = 0.9 if decays.get(name).takes_p else None
        for granularity in decays.get(name).granularities:
            for transition in ("diagonal", "delta"):
                yield DesignPoint(decay=name, p=p, granularity=granularity, transition=transition)
    for form in ("as_published", "as_run"):
        for position in ("none", "rope", "lrpe_half", "tpe"):
            yield DesignPoint(decay="tnl_l", granularity="scalar", position=position, form=form)
        yield DesignPoint(decay="hgrn2", share=True, form=form)
    yield SOFTMAX


@pytest.mark.parametrize("changes", [{"layers": 5}, {"glu_dim": 264, "heads": 2, "layers": 3}], ids=str)
def test_counts_that_are_remembered_are_those_of_the_model_built_whole(changes):
    for config in filter(fits, (nano(point, **changes) for point in points())):
        assert count_model(config).parameters == count_parameters(config), config.point.name


def test_a_fixed_decay_that_needs_many_layers_is_counted_all_the_same():
    point = DesignPoint(decay="tnl", granularity="scalar", position="tpe", form="as_run")
    config = ModelConfig(point=point, size=replace(get_size("410M"), d_model=128, glu_dim=8, heads=4), vocab_size=512)
    assert count_model(config).parameters == count_parameters(config)
