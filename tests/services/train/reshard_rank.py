"""One rank that trains a few steps and saves, or loads what other ranks saved: reshard_rank.py save|load RANK SIZE STAGE ...

Further arguments: PORT FOLDER WRITERS (the number of ranks that saved). Rank 0 prints the SHA-256 of every parameter's fp32
weights and moments, as DeepSpeed itself puts them together.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from services.train.environment import prepare_process
from services.train.job import Resources, World

TAG = "deepspeed"


def main(mode: str, rank: int, size: int, stage: int, port: str, folder: Path, writers: int) -> None:
    prepare_process(1, 0)
    import torch

    from decay_core.design import DesignPoint
    from decay_core.model import ModelConfig, build_model
    from decay_core.recipe import Recipe
    from decay_core.sizes import get_size
    from services.train import engine
    from services.train.snapshot import Snapshot

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size),
                      LOCAL_SIZE=str(size))  # fmt: skip
    world = World(rank=rank, size=size, device="cpu")
    engine.join(world)
    recipe = Recipe(steps=9, batch_size=8, seq_len=16, lr=0.01, eval_every=9, eval_sequences=1, checkpoint_every=9,
                    telemetry_every=9)  # fmt: skip
    resources = Resources(
        workers=size, threads=1, gpus=0, zero_stage=stage, micro_batch_size=8 // size, deterministic=True, elastic=True
    )
    # odd sizes, so that shards end inside parameters and need filling up
    config = ModelConfig(point=DesignPoint(decay="mamba2", granularity="scalar"), size=get_size("nano"), vocab_size=301)
    with engine.one_engine(build_model(config, seed=5 if mode == "save" else 6), recipe, resources, world) as trained:
        if mode == "save":
            for step in range(3):
                text = torch.randint(0, 301, (8, 16), generator=torch.Generator().manual_seed(step))
                trained.backward(text.chunk(size)[rank])
                trained.advance(0.01)
            Snapshot(*trained.states(TAG)).write(folder)
            torch.distributed.barrier()
        else:
            trained.load_of_others(str(folder), TAG, writers, rank)
        found = digests(trained.deepspeed)
    if world.leads:
        print(json.dumps(found), flush=True)
    engine.leave()


def digests(engine):
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = (
            False  # it links after the first group's first step, too early for others
        )
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        state = {"fp32": safe_get_full_fp32_param(parameter)}
        state |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        assert state["exp_avg"].abs().sum() > 0, name
        found[name] = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in state.items()}
    return found


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], Path(sys.argv[6]), int(sys.argv[7]))
