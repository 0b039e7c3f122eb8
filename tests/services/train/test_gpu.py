"""The same claims on CUDA devices: NCCL, bf16, kills. Run by `make test-gpu`; each test says how many GPUs it wants."""

import pytest
import torch
from test_training import GRIDS

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

# bf16 products and another order of sums; the tests print what they measure
BF16_BAND_NATS = 2e-2
FP32_BAND_NATS = 1e-3


def needs(gpus):
    return pytest.mark.skipif(torch.cuda.device_count() < gpus, reason=f"needs {gpus} CUDA device(s)")


def largest_difference(one, two):
    return max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True))


@needs(1)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_after_kill_gives_same_bits_on_one_gpu(train, precision):
    how = {"workers": 1, "gpus_per_worker": 1, "zero_stage": 1, "recipe": {"precision": precision}}
    train({"name": "killed", **how}, kill_at=7)
    resumed, quiet = train({"name": "killed", **how}, {"name": "quiet", **how})
    assert resumed.losses == quiet.losses
    assert len(quiet.losses) == 12
    assert resumed.result["weights_sha256"] == quiet.result["weights_sha256"]


@needs(1)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", GRIDS)
def test_every_transition_and_encoding_resumes_with_same_bits_and_gives_the_losses_of_a_cpu(train, name, precision):
    how = {"grid": GRIDS[name], "gpus_per_worker": 1, "recipe": {"precision": precision}}
    train({"name": "killed", **how}, kill_at=7)
    resumed, quiet = train({"name": "killed", **how}, {"name": "quiet", **how})
    (cpu,) = train({"name": "cpu", "grid": GRIDS[name]})
    assert resumed.losses == quiet.losses
    assert resumed.result["weights_sha256"] == quiet.result["weights_sha256"]
    print(f"{name}, {precision} GPU against fp32 CPU: largest difference {largest_difference(cpu, quiet):.1e} nats")
    assert largest_difference(cpu, quiet) <= (FP32_BAND_NATS if precision == "fp32" else BF16_BAND_NATS)


@needs(1)
def test_a_gpu_gives_the_losses_of_a_cpu(train):
    (cpu,) = train({"name": "cpu"})
    gpu, low = train(
        {"name": "gpu", "gpus_per_worker": 1},
        {"name": "low", "gpus_per_worker": 1, "recipe": {"precision": "bf16"}},
    )
    print(f"fp32, GPU against CPU: largest difference {largest_difference(cpu, gpu):.1e} nats")
    print(f"bf16 GPU against fp32 CPU: largest difference {largest_difference(cpu, low):.1e} nats")
    assert largest_difference(cpu, gpu) <= FP32_BAND_NATS
    assert 0 < largest_difference(cpu, low) <= BF16_BAND_NATS


@needs(2)
def test_all_zero_stages_on_two_gpus_give_the_losses_of_one(train):
    for precision, band in (("fp32", FP32_BAND_NATS), ("bf16", BF16_BAND_NATS)):
        how = {"gpus_per_worker": 1, "recipe": {"precision": precision}}
        (one,) = train({"name": f"one-{precision}", **how})
        stages = train(
            *({"name": f"{precision}-zero{s}", "workers": 2, "zero_stage": s, **how} for s in range(4)),
        )
        for stage, two in enumerate(stages):
            print(f"{precision}, ZeRO {stage}, 2 GPUs against 1: {largest_difference(one, two):.1e} nats")
            assert largest_difference(one, two) <= band


@needs(2)
def test_resume_after_kill_gives_same_bits_on_two_gpus(train):
    how = {"workers": 2, "gpus_per_worker": 1, "zero_stage": 2, "recipe": {"precision": "bf16"}}
    train({"name": "killed", **how}, kill_at=7, victim=1)
    resumed, quiet = train({"name": "killed", **how}, {"name": "quiet", **how})
    assert resumed.losses == quiet.losses
    assert resumed.result["weights_sha256"] == quiet.result["weights_sha256"]
