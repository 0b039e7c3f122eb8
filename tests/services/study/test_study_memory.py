"""Memory by ZeRO stage: what is held is counted by hand, what a micro-batch adds is what autograd saves of a whole model."""

import gc
from dataclasses import replace

import pytest
import torch

from decay_core.design import DesignPoint
from decay_core.model import DecayLinearTransformer, ModelConfig, build_model
from decay_core.recipe import Recipe
from decay_core.sizes import get_size
from services.study import memory
from services.study.cost import count_model
from services.study.memory import BLOCK, STREAM, Ranks, memory_of, saved_per_token

RECIPE = Recipe(
    steps=100, batch_size=64, seq_len=128, eval_every=1, eval_sequences=1, checkpoint_every=1, telemetry_every=1
)  # fmt: skip
BF16 = replace(RECIPE, precision="bf16")
POINTS = [
    DesignPoint(decay="mamba2"),
    DesignPoint(decay="gla", granularity="scalar", position="rope", form="as_run"),
    DesignPoint(decay="none", granularity="scalar", transition="delta"),
    DesignPoint(decay="hgrn2", share=True),
    DesignPoint(decay="tnl_l", granularity="scalar", position="tpe"),
    DesignPoint(decay="none", granularity="scalar", transition="softmax", position="rope"),
]


def config(point, size="nano", **changes):
    return ModelConfig(point=point, size=replace(get_size(size), **changes), vocab_size=512)


def whole(model, tokens, bf16):
    """Bytes that autograd saves of one forward of a whole model, each storage once and no parameter."""
    kept = {value.untyped_storage()._cdata: value for value in model.parameters()}
    own = len(kept)

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        head = model.head
        model.head = torch.nn.Identity()
        model.head.forward = lambda x, targets: x.sum()
        model(torch.zeros(1, tokens, dtype=torch.long))
        model.head = head
    return sum(tensor.untyped_storage().nbytes() for tensor in list(kept.values())[own:])


def forget(monkeypatch):
    """Nothing is measured yet."""
    monkeypatch.setattr(memory, "_by_head", {})
    monkeypatch.setattr(memory, "_by_width", {})


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_what_a_narrow_layer_saves_scales_up_to_what_a_whole_model_saves(point, bf16, monkeypatch):
    forget(monkeypatch)
    small = config(point, "micro", layers=3)
    model = DecayLinearTransformer(small)
    measured = (whole(model, 320, bf16) - whole(model, 128, bf16)) / 192
    saved = saved_per_token(small, bf16)
    assert measured == saved[STREAM] + 3 * saved[BLOCK]
    assert abs(saved[STREAM]) < saved[BLOCK]


def test_the_width_of_the_glu_costs_the_same_at_every_point(monkeypatch):
    costs = set()
    for point in POINTS:
        forget(monkeypatch)
        saved_per_token(config(point), True)
        costs.add(memory._by_width[True])
    assert len(costs) == 1 and costs.pop() > 0


def test_points_that_differ_in_decay_alone_save_nearly_the_same(monkeypatch):
    each = []
    for decay in ("mamba2", "gla", "hgrn2", "lightnet"):
        forget(monkeypatch)
        each.append(saved_per_token(config(DesignPoint(decay=decay), "160M"), True)[BLOCK])
    assert max(each) < 1.11 * min(each)


@pytest.mark.parametrize(
    "stage, weights, gradients, optimizer",
    [(0, 4, 4, 8), (1, 4, 4, 12 / 4), (2, 4, 4 / 4, 12 / 4), (3, 4 / 4 + 4, 4 / 4, 12 / 4)],
)
def test_what_is_held_is_sixteen_bytes_a_parameter_shared_out_stage_by_stage(stage, weights, gradients, optimizer):
    one = config(DesignPoint(decay="mamba2"))
    count = count_model(one).parameters
    held = memory_of(one, RECIPE, Ranks(stage=stage, workers=4, micro_batch=1))
    assert (held.weights, held.gradients, held.optimizer) == (weights * count, gradients * count, optimizer * count)
    assert held.buffers == (4 * count if stage else 0)
    parts = (held.weights, held.gradients, held.optimizer, held.buffers, held.copies, held.activations)
    assert held.total == sum(parts)


def test_autocast_copies_every_weight_that_is_multiplied_in_two_bytes():
    one = config(DesignPoint(decay="mamba2"))
    ranks = Ranks(stage=0, workers=1, micro_batch=2)
    assert memory_of(one, RECIPE, ranks).copies == 0
    assert memory_of(one, BF16, ranks).copies == 2 * count_model(one).multiplied


def test_activations_grow_with_the_micro_batch_and_logits_only_up_to_a_slice_of_the_head():
    large = ModelConfig(point=DesignPoint(decay="mamba2"), size=get_size("nano"), vocab_size=50257)
    one, two, four = (memory.activation_bytes(large, tokens, False) for tokens in (5000, 10_000, 20_000))
    saved = saved_per_token(large, False)
    per_token = saved[STREAM] + 2 * saved[BLOCK]
    assert one == 5000 * (per_token + 12 * 50432)
    slice_of_head = 12 * 50432 * (2**28 // 50432)
    assert (two - slice_of_head, four - slice_of_head) == (10_000 * per_token, 20_000 * per_token)


def test_buckets_are_what_the_engine_asks_deepspeed_for():
    from services.train import engine

    assert memory.LARGEST_BUCKET == engine.LARGEST_BUCKET


def test_measuring_leaves_the_number_of_threads_as_it_was(monkeypatch):
    forget(monkeypatch)
    before = torch.get_num_threads()
    saved_per_token(config(DesignPoint(decay="gla")), False)
    assert torch.get_num_threads() == before


ON_GPU = [
    (DesignPoint(decay="mamba2"), "160M", 2),
    (DesignPoint(decay="mamba2", granularity="scalar"), "160M", 8),
    (DesignPoint(decay="none", granularity="scalar", transition="softmax", position="rope"), "160M", 8),
    (DesignPoint(decay="mamba2"), "410M", 2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("point, size, batch", ON_GPU, ids=str)
def test_the_sum_is_a_little_more_than_the_peak_of_a_training_step(point, size, batch, monkeypatch):
    monkeypatch.setenv("DECAY_KERNEL", "chunked")
    one = ModelConfig(point=point, size=get_size(size), vocab_size=50257)
    model = build_model(one, seed=0).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    text = torch.zeros(batch, 2048, dtype=torch.long, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(text, text)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    peak = torch.cuda.max_memory_allocated()
    said = memory_of(one, replace(BF16, seq_len=2048), Ranks(stage=0, workers=1, micro_batch=batch)).total
    print(f"{point.name} {size}: {peak / 2**30:.2f} GiB, said {said / 2**30:.2f}, {said / peak - 1:+.1%}")
    del model, optimizer, loss
    gc.collect()
    torch.cuda.empty_cache()
    assert peak < said < 1.15 * peak
