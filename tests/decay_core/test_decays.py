"""The golden table: one row per decay. A new decay is one file in decay_core/decays/ and one row here.

`median`: lower median of λ in the first layer before training, f = 0 (as published, p = 0.9 where it takes p; LightNet
over 2048 positions; 12 heads where λ is a constant per head). `parameters`: of the 160M model in the first granularity,
GPT-2's vocabulary. `tiny`: what the naive scan gives for the last token's first head on `tiny_input`, with every
parameter of the decay at 0.25, in the first granularity; the numbers come from formulas.py, float64.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from design_points import place

from decay_core import decays, kernel_seam, positions
from decay_core.design import DesignPoint
from decay_core.model import ModelConfig, count_parameters
from decay_core.sizes import get_size

ROOT = Path(__file__).resolve().parents[2]
ALL, SCALAR = ("vector", "paired", "scalar"), ("scalar",)
GPT2_VOCAB = 50257


class Row(NamedTuple):
    median: float
    parameters: int
    granularities: tuple[str, ...]
    tiny: tuple[float, float]


GOLDEN = {
    "gla": Row(0.9576, 164_785_920, ALL, (1.2696477275224507, -0.36356644262975885)),
    "hgrn2": Row(0.5, 164_795_136, ALL, (1.090187800447223, -0.13079853125100263)),
    "lightnet": Row(0.999, 164_785_920, ALL, (1.179618319328075, -0.22271558945749093)),
    "mamba2": Row(0.931, 164_804_352, ALL, (0.9673223502363617, 0.005277269935646787)),
    "mamba2_no_a": Row(0.99, 164_795_136, ALL, (1.0116675166795521, -0.038401318021812056)),
    "mamba2_no_a_no_dt": Row(0.5, 164_785_920, ALL, (1.0430546380161618, -0.07144691057048323)),
    "mamba2_no_dt": Row(0.0027, 164_795_136, ALL, (0.9995687970756351, -0.025716928819167203)),
    "none": Row(1.0, 163_606_272, SCALAR, (1.2991394810604946, -0.4054901383849489)),
    "retnet": Row(0.999, 163_606_272, SCALAR, (1.280306927902459, -0.3782881075732008)),
    "sigmoid": Row(0.5, 164_785_920, ALL, (0.9943137427837814, -0.0257481858778129)),
    "simple_decay": Row(0.9, 164_795_136, ALL, (1.025509700767809, -0.058076054168897315)),
    "tnl": Row(0.0094, 163_606_272, SCALAR, (0.8147432084500628, 0.11775342164132266)),
    "tnl_l": Row(0.0094, 163_606_416, SCALAR, (1.2991394810604946, -0.4054901383849489)),
}


def point_of(name, granularity=None):
    kind = decays.get(name)
    return DesignPoint(decay=name, p=0.9 if kind.takes_p else None, granularity=granularity or kind.granularities[0])


def drawn(where):
    module = decays.get(where.point.decay)(where)
    with torch.no_grad():
        module.draw(torch.Generator().manual_seed(0))
    return module


def tiny_input(shape):
    """f (1, 3, *shape), q, k (1, 3, 2, 2), v (1, 3, 2, 2) without a random generator."""

    def waves(size, shift):
        return torch.sin(torch.arange(size, dtype=torch.float64) * 0.7 + shift)

    f = waves(3 * torch.Size(shape).numel(), 0.0).reshape(1, 3, *shape)
    return f, *(waves(12, shift).reshape(1, 3, 2, 2) for shift in (1.0, 2.0, 3.0))


def test_registry_and_golden_table_name_the_same_decays():
    assert set(decays.names()) == set(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_decay_supports_the_granularities_of_the_table(name):
    assert decays.get(name).granularities == GOLDEN[name].granularities


@pytest.mark.parametrize("name", GOLDEN)
def test_initial_median_is_as_in_the_table(name):
    kind = decays.get(name)
    sizes = {"heads": 400, "head_dim": 256} if kind.reads_input else {"heads": 12, "head_dim": 64}
    where = place(point_of(name), **sizes)
    length = 2048 if "lightnet" in name else 1
    width = where.shape if length == 1 else (1,)
    log_decay, _ = drawn(where)(torch.zeros(1, length, *width))
    assert abs(log_decay.exp().median().item() - GOLDEN[name].median) <= 0.002


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_count_at_160m_is_as_in_the_table(name):
    config = ModelConfig(point=point_of(name), size=get_size("160M"), vocab_size=GPT2_VOCAB)
    assert count_parameters(config) == GOLDEN[name].parameters


@pytest.mark.parametrize("name", GOLDEN)
def test_naive_output_on_the_tiny_input_is_as_in_the_table(name, monkeypatch):
    monkeypatch.setenv("DECAY_KERNEL", "naive")
    where = place(point_of(name), layer=1, layers=3, heads=2, head_dim=2)
    module, joint = decays.get(name)(where).double(), decays.get(name).joint_module(where)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.25)
    if joint is not None:
        torch.nn.init.constant_(joint.double().logits, 0.25)
    f, q, k, v = tiny_input(where.shape)
    log_decay, _ = module(f, None if joint is None else joint()[1])
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(1, 3, 2)
    o, _ = kernel_seam.decay_scan(q, k, v, log_decay)
    assert o[0, -1, 0].tolist() == pytest.approx(GOLDEN[name].tiny, abs=1e-12, rel=0)


# Lower medians of λ at the start with f = 0, after weight decay alone for 20,000 steps at lr 3e-4 (factor 0.567).
STARTS = {
    "mamba2": (0.931, 0.806),
    "mamba2_no_a": (0.990, 0.931),
    "mamba2_no_dt": (0.0027, 0.097),
    "mamba2_no_a_no_dt": (0.5, 0.5),
}


@pytest.mark.parametrize("granularity", ("vector", "scalar"))
@pytest.mark.parametrize("name", STARTS)
def test_mamba2_starts_where_its_distribution_says_and_weight_decay_alone_moves_it(name, granularity):
    sizes = {"heads": 500, "head_dim": 256} if granularity == "vector" else {"heads": 128_000, "head_dim": 1}
    module = drawn(place(point_of(name, granularity), **sizes))
    f = torch.zeros(1, 1, *module.place.shape)
    start = module(f)[0].exp().median().item()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.567)
    after = module(f)[0].exp().median().item()
    assert (start, after) == pytest.approx(STARTS[name], abs=0.01)


@pytest.mark.parametrize("p, after", [(0.8, 0.687), (0.9, 0.777), (0.95, 0.842), (0.99, 0.931)])
def test_simple_decay_starts_at_p_and_weight_decay_alone_moves_it(p, after):
    module = drawn(place(DesignPoint(decay="simple_decay", p=p)))
    f = torch.zeros(1, 1, 2, 4)
    assert module(f)[0].exp().median().item() == pytest.approx(p, abs=1e-6)
    with torch.no_grad():
        module.offset.mul_(0.567)
    assert module(f)[0].exp().median().item() == pytest.approx(after, abs=0.001)


@pytest.mark.parametrize("form, start", [("as_published", 0.5 ** (1 / 16)), ("as_run", 0.5)])
def test_gla_starts_at_the_median_of_its_form(form, start):
    module = drawn(place(DesignPoint(decay="gla", form=form)))
    assert module(torch.zeros(1, 1, 2, 4))[0].exp().median().item() == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("layers, last", [(12, 0.958), (24, 0.979)])
def test_hgrn2_starts_at_a_half_in_the_first_layer_and_near_one_in_the_last(layers, last):
    point = DesignPoint(decay="hgrn2")
    where = place(point, layer=layers - 1, layers=layers)
    joint = decays.get("hgrn2").joint_module(where)
    with torch.no_grad():
        joint.draw(torch.Generator())
    f = torch.zeros(1, 1, 2, 4)
    first = drawn(place(point, layer=0, layers=layers))(f, joint()[0])[0]
    deep = drawn(where)(f, joint()[-1])[0]
    assert first.exp().median().item() == 0.5
    assert deep.exp().median().item() == pytest.approx(last, abs=0.0005)


@pytest.mark.parametrize("layers, heads, medians", [(12, 12, (0.946, 0.975)), (24, 16, (0.949, 0.976))])
def test_tnl_as_run_has_the_medians_of_the_authors_code(layers, heads, medians):
    point = DesignPoint(decay="tnl", granularity="scalar", form="as_run")
    found = []
    for layer in (0, layers // 2, layers - 1):
        log_decay, _ = drawn(place(point, layer=layer, layers=layers, heads=heads))(torch.zeros(1, dtype=torch.float64))
        found.append(log_decay.exp().median().item())
    assert found[:2] == pytest.approx(medians, abs=0.001)
    assert 1 - found[2] == pytest.approx(1e-6, abs=1e-6) and found[2] < 1


def test_tnl_as_published_forgets_almost_at_once_in_the_first_layers():
    point = DesignPoint(decay="tnl", granularity="scalar")
    log_decay, _ = drawn(place(point, layer=0, layers=12, heads=12))(torch.zeros(1))
    assert log_decay.exp().median().item() == pytest.approx(0.0094, abs=1e-4)


@pytest.mark.parametrize("heads, layers, n", [(1, 3, 512**0.5), (2, 1, 2.0)])
def test_tnl_as_run_is_defined_for_one_head_and_for_one_layer(heads, layers, n):
    point = DesignPoint(decay="tnl", granularity="scalar", form="as_run")
    log_decay, _ = drawn(place(point, heads=heads, layers=layers))(torch.zeros(1, dtype=torch.float64))
    depth = 1.0 if layers == 1 else 1 + 1e-5
    assert log_decay[0].item() == pytest.approx(-depth / n, rel=1e-12)


def test_tnl_l_starts_without_decay_as_run_and_at_the_table_as_published():
    for form in ("as_run", "as_published"):
        where = place(DesignPoint(decay="tnl_l", granularity="scalar", form=form), layer=1)
        fixed = place(DesignPoint(decay="tnl", granularity="scalar", form=form), layer=1)
        expected = torch.zeros(2) if form == "as_run" else drawn(fixed)(torch.zeros(1))[0]
        assert torch.equal(drawn(where)(torch.zeros(1))[0], expected)


def test_tnl_l_grows_above_one_only_as_run():
    for form, largest in (("as_run", 0.5), ("as_published", 0.0)):
        module = drawn(place(DesignPoint(decay="tnl_l", granularity="scalar", form=form)))
        torch.nn.init.constant_(module.theta, 0.5)
        assert module(torch.zeros(1))[0].max().item() == largest


def test_constant_decay_keeps_its_value_when_the_model_is_cast_to_bf16():
    module = drawn(place(DesignPoint(decay="tnl", granularity="scalar", form="as_run"), layer=2))
    before = module(torch.zeros(1))[0]
    assert torch.equal(module.bfloat16()(torch.zeros(1, dtype=torch.bfloat16))[0], before)


def test_no_other_line_of_the_code_spells_a_decay():
    # Words that also mean something else: a position and many an option are "none" too.
    words = set(decays.names()) - set(positions.names())
    literal = re.compile("[\"'](" + "|".join(map(re.escape, sorted(words))) + ")[\"']")
    sources = [p for folder in ("decay_core", "kernels", "services") for p in (ROOT / folder).rglob("*.py")]
    own = ROOT / "decay_core" / "decays"
    spelled = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        if own not in path.parents
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if literal.search(line)
    ]
    assert sources and not spelled
