"""Reading a text token by token with a state gives the logits of reading it at once, and gradients are right."""

import pytest
import torch
from design_points import MODELS
from test_model import UNCONFOUNDED, any_tokens, configured, shaken
from torch.func import functional_call

from decay_core.design import DesignPoint, Refusal
from decay_core.model import ModelConfig, build_model, state_size
from decay_core.sizes import Size, get_size

POINTS = MODELS + UNCONFOUNDED


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_decoding_equals_the_parallel_form(point):
    model, tokens = shaken(configured(point)), any_tokens(2, 10)
    expected, state, parts = model(tokens), None, []
    for new in tokens.split([4, 1, 1, 3, 1], dim=1):
        logits, state = model.extend(new, state)
        parts.append(logits)
    assert state.position == 10
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_state_size_is_what_decoding_holds(point):
    model = build_model(configured(point), seed=0)
    _, state = model.extend(any_tokens(1, 7))
    beside = 0 if state.stream is None else state.stream.numel()
    beside += sum(layer.past.numel() for layer in state.layers if layer.past is not None)
    assert sum(tensor.numel() for tensor in state.tensors()) - beside == state_size(model.config, 7)


def test_the_state_of_linear_attention_does_not_grow_and_that_of_softmax_does():
    size = get_size("160M")
    linear = ModelConfig(point=DesignPoint(decay="mamba2"), size=size, vocab_size=9)
    softmax = ModelConfig(
        point=DesignPoint(decay="none", granularity="scalar", position="rope", transition="softmax"), size=size, vocab_size=9
    )
    assert state_size(linear, 100) == state_size(linear, 10_000) == 12 * 12 * 64 * 64
    assert state_size(softmax, 100) == 12 * 100 * 2 * 768


def test_encodings_that_widen_double_the_state_and_dplr_as_run_does_too():
    size = get_size("160M")

    def held(**axes):
        return state_size(ModelConfig(point=DesignPoint(granularity="scalar", **axes), size=size, vocab_size=9), 1)

    plain = held(decay="gla")
    assert held(decay="gla", position="rope") == plain
    assert held(decay="gla", position="rope", form="as_run") == held(decay="gla", position="lrpe") == 2 * plain
    assert held(decay="sigmoid", transition="delta", form="as_run") == 2 * plain
    assert held(decay="sigmoid", transition="delta") == held(decay="gla", head_dim=64) == plain


def test_rows_of_a_state_can_be_chosen_again():
    model, tokens = shaken(configured(DesignPoint(decay="lightnet", position="tpe"))), any_tokens(3, 9)
    _, state = model.extend(tokens[:, :5])
    rows = torch.tensor([2, 0])
    logits, _ = model.extend(tokens[rows, 5:], state.select(rows))
    assert torch.allclose(logits, model(tokens[rows])[:, 5:], rtol=0, atol=1e-10)


TINY = Size(name="tiny", d_model=4, layers=1, heads=1, glu_dim=4)
GRADIENTS = [
    DesignPoint(decay="sigmoid", granularity=granularity, position=position)
    for granularity, position in (
        ("scalar", "rope"),
        ("paired", "rope"),
        ("scalar", "rope_half"),
        ("vector", "lrpe"),
        ("vector", "lrpe_half"),
        ("vector", "tpe"),
    )
] + [
    DesignPoint(decay="none", granularity="scalar", transition="delta"),
    DesignPoint(decay="sigmoid", granularity="scalar", transition="delta"),
    DesignPoint(decay="sigmoid", granularity="vector", transition="delta"),
    DesignPoint(decay="simple_decay", p=0.99, granularity="vector", transition="delta", form="as_run"),
    DesignPoint(decay="simple_decay", p=0.99, granularity="scalar", transition="delta", form="as_run"),
    DesignPoint(decay="none", granularity="scalar", transition="softmax", position="rope"),
]


@pytest.mark.parametrize("point", GRADIENTS, ids=lambda point: point.name)
def test_gradients_of_every_parameter_pass_gradcheck(point):
    model = shaken(ModelConfig(point=point, size=TINY, vocab_size=3))
    names = [name for name, _ in model.named_parameters() if not name.startswith(("embedding", "head", "blocks.0.glu."))]
    tokens = torch.tensor([[0, 2, 1]])

    def loss(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (tokens, tokens))

    values = tuple(dict(model.named_parameters())[name].detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "axes, reason, kind, nearest",
    [
        ({"decay": "gla", "head_dim": 5}, "head_dim 5 does not divide the width 12", "size", "gla-vector"),
        ({"decay": "gla", "granularity": "paired", "head_dim": 3}, "no pairs", "size", "gla-paired"),
        (
            {"decay": "gla", "granularity": "scalar", "position": "rope", "head_dim": 3},
            "multiple of 2 channels, not of 3",
            "size",
            "gla-scalar-rope",
        ),
        (
            {"decay": "gla", "granularity": "scalar", "position": "lrpe_half", "head_dim": 1},
            "multiple of 2",
            "size",
            "gla-scalar-lrpe_half",
        ),
        (
            {"decay": "gla", "granularity": "scalar", "position": "rope_half", "head_dim": 2},
            "multiple of 4",
            "size",
            "gla-scalar-rope_half",
        ),
    ],
)
def test_points_that_do_not_go_with_the_size_are_refused_with_the_nearest_one(axes, reason, kind, nearest):
    with pytest.raises(Refusal, match=reason) as caught:
        build_model(configured(DesignPoint(**axes)))
    assert (caught.value.kind, caught.value.nearest) == (kind, nearest)
