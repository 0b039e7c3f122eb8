"""The code of a mechanism is every file its forward pass is made of, found by its classes."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from decay_core import decays
from decay_core.design import DesignPoint
from decay_core.model import ModelConfig, build_model
from decay_core.sizes import get_size
from services.study.mechanism import mechanism_code

ROOT = Path(__file__).parents[3]
POINTS = [
    DesignPoint(decay="mamba2"),
    DesignPoint(decay="mamba2_no_a", granularity="scalar", position="rope", form="as_run"),
    DesignPoint(decay="lightnet", share=True),
    DesignPoint(decay="tnl_l", granularity="scalar", position="tpe"),
    DesignPoint(decay="sigmoid", transition="delta"),
    DesignPoint(decay="none", granularity="scalar", transition="softmax", position="rope"),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_digests_are_those_of_files_of_this_checkout(point):
    for name, digest in mechanism_code(point).items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_every_file_that_a_forward_and_backward_pass_runs_is_among_them(point):
    built = build_model(ModelConfig(point=point, size=get_size("nano"), vocab_size=300), seed=0)
    tokens, ran = torch.arange(64).reshape(1, 64), set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "decay_core") or path.is_relative_to(ROOT / "kernels"):
            ran.add(path.relative_to(ROOT).as_posix())

    sys.setprofile(note)
    try:
        built(tokens, tokens).backward()
    finally:
        sys.setprofile(None)
    finders = {f"decay_core/{name}.py" for name in ("decays/__init__", "positions/__init__", "transitions/__init__")}
    assert len(ran) >= 6 and ran - finders <= mechanism_code(point).keys()


def test_the_parents_of_a_decay_belong_to_it_and_other_decays_do_not():
    files = mechanism_code(DesignPoint(decay="mamba2_no_a"))
    own = {name for name in files if name.startswith("decay_core/decays/")}
    assert own == {"decay_core/decays/mamba2_no_a.py", "decay_core/decays/mamba2.py"}


def test_a_decay_from_another_folder_is_named_as_if_it_stood_with_the_others(tmp_path, monkeypatch):
    file = tmp_path / "toy_of_mechanism.py"
    file.write_text("from decay_core.decays.gla import GatedLinearAttention\n\n\nclass Toy(GatedLinearAttention):\n    pass\n")
    monkeypatch.setattr(decays, "__path__", [*decays.__path__, str(tmp_path)])
    decays._registry.cache_clear()
    try:
        files = mechanism_code(DesignPoint(decay="toy_of_mechanism"))
        assert files["decay_core/decays/toy_of_mechanism.py"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert "decay_core/decays/gla.py" in files
    finally:
        decays._registry.cache_clear()
        sys.modules.pop("decay_core.decays.toy_of_mechanism", None)
