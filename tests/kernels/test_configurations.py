"""Which configuration a Triton scan takes: the measured one for bf16, else the launcher's, and a policy that is asked for."""

import dataclasses

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import tuned

pytest.importorskip("triton", reason="Triton is for Linux")

from kernels import decay_scan_triton as module

SIZES = ("sm_90", "vector", 64, 64)
BF16 = torch.bfloat16


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A table with one row, which differs from the default."""
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    default = module.chosen_config(*SIZES, BF16, "")[0]
    config = dataclasses.replace(default, chunk=default.chunk // 2)
    fields = {"milliseconds": 1.0, "shape": [], "gpu": "", "versions": "", "date": ""}
    row = tuned.Row(
        architecture="sm_90", granularity="vector", key_dim=64, value_dim=64, config=dataclasses.asdict(config), **fields
    )
    tuned.write_rows(tuned.TABLE, [row])
    return config


def test_a_measured_configuration_is_taken_for_what_was_measured_alone(measured):
    assert module.chosen_config(*SIZES, BF16, "") == (measured, "tuned.json")
    for sizes, dtype in ((SIZES, torch.float16), (SIZES, torch.float32), (("sm_80", *SIZES[1:]), BF16)):
        config, origin = module.chosen_config(*sizes, dtype, "")
        assert origin == "default" and config != measured


@pytest.mark.parametrize("asked", ["save", "recompute"])
def test_a_policy_that_is_asked_for_is_told(measured, asked):
    assert module.chosen_config(*SIZES, BF16, asked) == (measured, f"tuned.json, DECAY_KERNEL_POLICY={asked}")


@pytest.mark.parametrize("granularity", ["scalar", "vector"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 64), (64, 256), (256, 256), (40, 24)], ids=str)
def test_every_default_saves_states(granularity, dtype, dims):
    config, _ = module.chosen_config("sm_90", granularity, *dims, dtype, "")
    assert config.policy != "recompute"


def test_a_measured_configuration_that_recomputes_gives_way_where_saving_is_asked_for(measured):
    row = tuned.rows(tuned.TABLE)[SIZES]
    tuned.write_rows(tuned.TABLE, [dataclasses.replace(row, config={**row.config, "policy": "recompute"})])
    config, origin = module.chosen_config(*SIZES, BF16, "save")
    assert config.policy == "save" and origin == "default, since DECAY_KERNEL_POLICY=save"
