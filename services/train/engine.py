"""The DeepSpeed engine, with its configuration made from our recipe and its loader made safe.

Surprising: bf16 is torch's autocast around fp32 parameters, inside the module DeepSpeed sees, not DeepSpeed's `bf16` mode:
decay parameters stay fp32 (in bf16 Mamba2's delta would have steps of 3 %), gradients are reduced in fp32, and all ZeRO
stages compute the same thing (in DeepSpeed's bf16 mode they do not; its autocast mode keeps module-global state that would
leak from one trial of a warm worker into the next). Price: ZeRO-3 gathers weights in fp32.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_core.model import DecayLinearTransformer
from decay_core.recipe import Recipe, parameter_groups
from services.study import faults
from services.train.job import Resources, World
from services.train.reshard import Shards, put

LARGEST_BUCKET = 200_000_000  # elements; DeepSpeed's advice for one node
LARGEST_PERSISTENT = 100_000  # elements; ZeRO-3 keeps smaller parameters whole (DeepSpeed's default, scaled to the model)
NOWHERE = "checkpoint"  # the folder that DeepSpeed is told; its states are taken before they become files
IGNORED = -100  # the target that torch's cross-entropy leaves out


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, told which accelerator it has; on a CPU without compiling its shared-memory op (55 s and a compiler)."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    return deepspeed


def join(world: World) -> None:
    """Joins the process group through DeepSpeed (or adopts Ray Train's). Needs MASTER_ADDR and the rank in the environment."""
    deepspeed = import_deepspeed(world.device)
    backend = "gloo" if world.device == "cpu" else "nccl"
    if world.device != "cpu":
        torch.cuda.set_device(world.device)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Leaves the process group, so that a warm worker can join the next one."""
    import deepspeed.comm

    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()


class LossModule(nn.Module):
    """The model under the recipe's precision: tokens (b, t) int64 in, mean cross-entropy (nats) out.

    Targets (b, t) are the next tokens unless they are given; a target of IGNORED does not count.
    """

    def __init__(self, model: DecayLinearTransformer, recipe: Recipe, device: str) -> None:
        super().__init__()
        self.model = model
        self._autocast = recipe.precision == "bf16"
        self._device_type = torch.device(device).type

    def forward(self, tokens_bt: Tensor, observe: Any = None, targets_bt: Tensor | None = None, judge: bool = False) -> Tensor:
        """Loss on the targets (0-d); with `judge` their loss, the share that is right, and the share of whole rows (3,)."""
        if targets_bt is None:
            targets_bt = _next_tokens(tokens_bt)
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocast):
            if judge:
                return _scores(self.model(tokens_bt), targets_bt, self.model.config.vocab_size)
            loss: Tensor = self.model(tokens_bt, targets_bt, observe=observe)
        return loss


def _next_tokens(tokens_bt: Tensor) -> Tensor:
    """The t - 1 targets inside each window; the last position predicts nothing (kernels like even t)."""
    nothing = torch.full_like(tokens_bt[:, :1], IGNORED)
    return torch.cat([tokens_bt[:, 1:], nothing], dim=1)


def _scores(logits_btv: Tensor, targets_bt: Tensor, vocab_size: int) -> Tensor:
    """Mean loss over the targets, the share of them that is the likeliest token, the share of rows where all are."""
    asked_bt = targets_bt != IGNORED
    right_bt = logits_btv[..., :vocab_size].argmax(-1) == targets_bt
    loss = F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten(), ignore_index=IGNORED)
    return torch.stack([loss, right_bt.sum() / asked_bt.sum(), (right_bt | ~asked_bt).all(1).float().mean()])


def deepspeed_config(recipe: Recipe, resources: Resources, parameters: int) -> dict[str, Any]:
    """DeepSpeed's own configuration file for this trial; saved with the trial.

    Buckets are no larger than the model: at DeepSpeed's default a nano model would touch 2 GB of buffer in every step.
    """
    accumulate = recipe.batch_size // (resources.workers * resources.micro_batch_size)
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": resources.micro_batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": recipe.grad_clip,
        "zero_optimization": {
            "stage": resources.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": min(LARGEST_BUCKET, parameters),
            "allgather_bucket_size": min(LARGEST_BUCKET, parameters),
            "stage3_param_persistence_threshold": min(LARGEST_PERSISTENT, parameters // 100),
        },
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"use_node_local_storage": False, "load_universal": False},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


class Engine:
    """One model under DeepSpeed. `destroy` it before the next trial of the same process."""

    def __init__(self, model: DecayLinearTransformer, recipe: Recipe, resources: Resources, world: World) -> None:
        deepspeed = import_deepspeed(world.device)
        self.config = deepspeed_config(recipe, resources, sum(value.numel() for value in model.parameters()))
        self.accumulate: int = self.config["gradient_accumulation_steps"]
        self._zero3 = resources.zero_stage == 3
        self._zero0 = resources.zero_stage == 0
        self._recipe = recipe
        module = LossModule(model, recipe, world.device).to(world.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(module.model, recipe),
            lr=0.0,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=world.device != "cpu",
        )
        if faults.armed():
            optimizer.register_step_post_hook(lambda *_: faults.point("train.optimizer", rank=world.rank))
        self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.config)
        self.deepspeed.checkpoint_engine = _safe_checkpoint_engine()

    @property
    def model(self) -> DecayLinearTransformer:
        """The model itself (its parameters are partitioned under ZeRO-3)."""
        model: DecayLinearTransformer = self.deepspeed.module.model
        return model

    def backward(self, tokens_bt: Tensor, observe: Any = None, targets_bt: Tensor | None = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its detached loss (a 0-d tensor on the device)."""
        loss = self.deepspeed(tokens_bt, observe, targets_bt)
        self.deepspeed.backward(loss)
        return loss.detach()

    def at_boundary(self) -> bool:
        """Whether the next `advance` is the one that changes weights."""
        return bool(self.deepspeed.is_gradient_accumulation_boundary())

    def advance(self, learning_rate: float) -> float | Tensor | None:
        """Ends a micro-batch; at the boundary it steps the optimizer and returns the gradient norm before clipping."""
        if not self.at_boundary():
            self.deepspeed.step()
            return None
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        norm: Any = None
        if self._zero0:
            norm = nn.utils.get_total_norm([p.grad for p in self.deepspeed.module.parameters() if p.grad is not None])
        self.deepspeed.step()
        return norm if self._zero0 else self.deepspeed.get_global_grad_norm()

    def loss(self, tokens_bt: Tensor) -> Tensor:
        """Loss without gradients (0-d, on the device); every rank must call it equally often under ZeRO-3."""
        return self._without_gradients(tokens_bt)

    def judge(self, tokens_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Loss, share of right targets and share of wholly right rows (3, on the device), otherwise as `loss`."""
        return self._without_gradients(tokens_bt, None, targets_bt, True)

    def _without_gradients(self, *inputs: Any) -> Tensor:
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                value: Tensor = self.deepspeed(*inputs)
        finally:
            self.deepspeed.train()
        return value

    def weights(self, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """The fp32 weights by name on the CPU; all ranks must iterate, only those with `keep` get the tensors' content."""
        if not self._zero3:
            for name, value in self.model.state_dict().items():
                yield name, value.detach().cpu()
            return
        from deepspeed import zero

        for name, parameter in self.model.named_parameters():
            with zero.GatheredParameters([parameter]):
                yield name, parameter.detach().cpu().clone() if keep else torch.empty(0)

    def states(self, tag: str) -> tuple[dict[str, Any], dict[str, Path]]:
        """What DeepSpeed would write now on this rank: states by file (below `tag`), and files that go along. Collective.

        The states hold the tensors that are trained on: copy them before the next step.
        """
        files = self.deepspeed.checkpoint_engine
        files.states, scripts = {}, {}
        # DeepSpeed copies its scripts itself, past its checkpoint engine, into a folder that does not exist yet
        self.deepspeed._copy_recovery_script = lambda _: scripts.update(_recovery_scripts())
        self.deepspeed.save_checkpoint(NOWHERE, tag=tag, save_latest=False)
        return {os.path.relpath(path, NOWHERE): state for path, state in files.states.items()}, scripts

    def load(self, folder: str, tag: str) -> None:
        """Puts back what `save` wrote, on the same number of ranks; collective."""
        path, _ = self.deepspeed.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise FileNotFoundError(f"{folder}/{tag} holds no DeepSpeed state")

    def load_of_others(self, folder: str, tag: str, ranks: int, rank: int) -> None:
        """Puts back what `ranks` ranks saved, on another number of them; collective. `rank` is this process's own."""
        if self._zero0:  # nothing is sharded
            self.load(folder, tag)
            return
        files = self.deepspeed.checkpoint_engine
        shards = Shards(Path(folder, tag), ranks, self.config["zero_optimization"]["stage"], files.open)
        put(self.deepspeed, shards, rank)

    def destroy(self) -> None:
        """Frees hooks and buffers that would otherwise outlive the trial."""
        self.deepspeed.destroy()


@contextmanager
def one_engine(model: DecayLinearTransformer, recipe: Recipe, resources: Resources, world: World) -> Iterator[Engine]:
    """An engine that is destroyed whatever happens."""
    engine = Engine(model, recipe, resources, world)
    try:
        yield engine
    finally:
        engine.destroy()


def is_finite(value: float) -> bool:
    """Whether a logged number is usable."""
    return math.isfinite(value)


def _safe_checkpoint_engine() -> Any:
    """DeepSpeed's files: kept in memory when saved, and loaded with weights_only, so that a checkpoint cannot run code."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]

    class SafeCheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
        states: dict[str, Any]

        def save(self, state_dict: Any, path: str) -> None:
            self.states[path] = state_dict

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """No folder: nothing is written here."""

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)

        def open(self, path: Path) -> Any:
            """A file's content by memory map: only what is looked at is read."""
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    return SafeCheckpointEngine()


def _recovery_scripts() -> dict[str, Path]:
    """DeepSpeed's scripts that make one file of weights from a checkpoint's shards; they lie beside the shards."""
    from deepspeed import utils

    folder = Path(utils.__file__).parent
    return {name: folder / name for name in ("zero_to_fp32.py", "zero_to_torch.py") if (folder / name).exists()}
