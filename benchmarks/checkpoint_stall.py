"""What checkpoints cost the steps of a trial: mean step time with a checkpoint every N steps, as a ratio to none.

Trains one real trial (DeepSpeed, step log, commits with digests and fsync) three ways in turn: without checkpoints, waiting for
each of them, and as the service does it, behind the steps' back. The last step and its checkpoint, which everything waits for,
are left out, and so are the first steps. The ratio has all of it: on a CPU the thread that writes competes with the step for
cores and memory. How long a checkpoint holds its step up is what remains where it does not.

    .venv/bin/python benchmarks/checkpoint_stall.py [--size nano] [--every 20] [--steps 120] [--rounds 3] [--gpus 1]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_STEPS = 10
WAYS = ("none", "waits", "behind")


def job_in(folder: Path, arguments: argparse.Namespace, every: int) -> dict[str, Any]:
    """What a worker would be told of a trial of a recall task, whose tokens are generated, with its storage in `folder`."""
    from services.data.corpus import prepare_corpus
    from services.schedule.jobs import data_record, data_spec, job_of
    from services.study.file import Study
    from services.study.manifest import Manifest
    from services.study.plan import make_plan
    from services.study.storage import Storage

    recipe = {"steps": arguments.steps, "batch_size": arguments.batch, "seq_len": arguments.seq_len, "lr": 0.001,
              "eval_every": arguments.steps, "eval_sequences": 1, "checkpoint_every": every, "precision": arguments.precision,
              "telemetry_every": arguments.steps}  # fmt: skip
    task = {"vocab_size": 4096, "pairs": 4, "train_examples": 100_000, "held_out_examples": 100}
    study = Study.model_validate(
        {
            "name": "stall", "question": "what does a checkpoint cost?", "space": [{"decay": "hgrn2"}], "recipe": recipe,
            "sizes": [arguments.size], "data": {"source": "mqar", "recall": task}, "storage": str(folder),
            "resources": {"gpus_per_worker": arguments.gpus, "zero_stage": arguments.zero_stage},
        }
    )  # fmt: skip
    plan = make_plan(study)
    record = data_record(prepare_corpus(data_spec(study), folder), study.to_recipe())
    return job_of(plan.trials[0], plan, Storage(str(folder)), Manifest(study={}, trials={}, data=record, started_ms=0))


def measure(way: str, arguments: argparse.Namespace) -> tuple[float, list[float]]:
    """Mean seconds of a step, and the seconds that each checkpoint held its step up."""
    import torch

    from services.train import loop
    from services.train.environment import device_of
    from services.train.job import TrialJob, World

    ends: list[float] = []
    stalls: list[float] = []

    class Timed(loop.Trainer):
        def _step(self) -> None:
            super()._step()
            if arguments.gpus:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def _save(self) -> None:
            begun = time.perf_counter()
            super()._save()
            if way == "waits":
                self.saver.wait()
            stalls.append(time.perf_counter() - begun)

    original, loop.Trainer = loop.Trainer, Timed  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            every = arguments.steps if way == "none" else arguments.every
            job = TrialJob(**job_in(Path(folder), arguments, every))
            loop.train_trial(job, World(rank=0, size=1, device=device_of(arguments.gpus)))
    finally:
        loop.Trainer = original  # type: ignore[misc]
    window = ends[WARM_STEPS - 1 : -1]
    return (window[-1] - window[0]) / (len(window) - 1), stalls[:-1]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano")
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--steps", type=int, default=121)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's temporary folder")
    arguments = parser.parse_args()
    from services.train.environment import device_name, device_of, prepare_process

    prepare_process(1, arguments.gpus)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    from services.train import engine
    from services.train.job import World

    device = device_of(arguments.gpus)
    engine.join(World(rank=0, size=1, device=device))
    means: dict[str, list[float]] = {way: [] for way in WAYS}
    stalls: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            mean, held_up = measure(way, arguments)
            means[way].append(mean)
            stalls[way] += held_up
    engine.leave()
    print(f"{device_name(device)}, {os.cpu_count()} cores, {arguments.size}, {arguments.precision}, "
          f"ZeRO {arguments.zero_stage}, batch {arguments.batch} x {arguments.seq_len}, a checkpoint every {arguments.every} "
          f"of {arguments.steps} steps, {arguments.rounds} rounds")  # fmt: skip
    print("| checkpoints | mean step, ms | ratio to none | least and most of the rounds | a checkpoint holds a step up, ms "
          "| of the steps between |\n|---|---|---|---|---|---|")  # fmt: skip
    none = statistics.median(means["none"])
    for way in WAYS:
        ratios = [mean / base for mean, base in zip(means[way], means["none"], strict=True)]
        held_up = statistics.median(stalls[way]) if stalls[way] else 0.0
        print(f"| {way} | {1000 * statistics.median(means[way]):.2f} | {statistics.median(means[way]) / none:.3f} "
              f"| {min(ratios):.3f} to {max(ratios):.3f} | {1000 * held_up:.1f} "
              f"| {held_up / (arguments.every * none):.2%} |")  # fmt: skip
    held = statistics.median(stalls["behind"]) / (arguments.every * none)
    print(f"steps wait for checkpoints, at most 3 % of their time: {'holds' if held <= 0.03 else 'FAILS'} ({held:.2%})")
    whole = statistics.median(means["behind"]) / none - 1
    said = "holds" if whole <= 0.03 else "FAILS"
    print(f"the mean step, with what the writing thread takes, at most 3 %: {said} ({whole:.2%})")


if __name__ == "__main__":
    main()
