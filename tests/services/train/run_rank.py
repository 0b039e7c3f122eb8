"""One rank as its own process: run_rank.py RANK KILL_AT_STEP PORT=JOB.json ... trains the jobs one after another.

Rank 0 prints a line per job: RESULT and the result, or FAILED and the reason, as JSON. With KILL_AT_STEP above 0 the
process kills itself (SIGKILL) when its step counter reaches that step, before the step is logged and after the checkpoints
before it are committed (fault points are for kills in between).
"""

import json
import os
import signal
import sys
from pathlib import Path

from services.study.fence import Fenced
from services.train.environment import device_of, prepare_process
from services.train.job import TrialFailed, TrialJob, World
from services.train.notice import Preempted


def main(rank: str, kill_at_step: str, *jobs: str) -> None:
    first = read(jobs[0])
    prepare_process(first.rank_resources.threads, first.rank_resources.gpus)
    from services.train import engine, loop

    if int(kill_at_step):
        _die_at(loop.Trainer, int(kill_at_step))
    for port_and_job in jobs:
        job = read(port_and_job)
        resources = job.rank_resources
        device = f"cuda:{rank}" if resources.gpus else device_of(0)
        world = World(rank=int(rank), size=resources.workers, device=device)
        local = rank if resources.gpus else "0"
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port_and_job.partition("=")[0], RANK=rank, LOCAL_RANK=local,
                          WORLD_SIZE=str(world.size), LOCAL_SIZE=str(world.size))  # fmt: skip
        engine.join(world)
        try:
            line = "RESULT " + json.dumps(loop.train_trial(job, world))
        except (TrialFailed, Fenced, Preempted) as failure:
            line = "FAILED " + json.dumps(f"{type(failure).__name__}: {failure}")
        finally:
            engine.leave()
        print(line, flush=True)


def read(port_and_job: str) -> TrialJob:
    return TrialJob(**json.loads(Path(port_and_job.partition("=")[2]).read_text()))


def _die_at(trainer: type, step: int) -> None:
    original = trainer._step

    def step_or_die(self):  # type: ignore[no-untyped-def]
        if self.progress.step == step:
            self.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    trainer._step = step_or_die


if __name__ == "__main__":
    main(*sys.argv[1:])
