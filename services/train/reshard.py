"""A checkpoint of any number of ranks, put onto another number: fp32 weights and both moments, moved and never computed with.

DeepSpeed cuts them into flat pieces whose borders depend on the number of ranks. Here each parameter is put together from the
pieces of all files, read by memory map, and cut again as the running engine has it. Surprising: DeepSpeed's own way (universal
checkpoints) is not taken, because it gives every parameter group the hyperparameters of the first one (so weight decay would
reach parameters that are to have none) and reads files with a loader that can run code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
Loader = Callable[[Path], Any]


class Shards:
    """What the ranks of a ZeRO checkpoint in `folder` have of each parameter. `load` opens one file by memory map."""

    def __init__(self, folder: Path, ranks: int, stage: int, load: Loader) -> None:
        files = [folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
        self._ranks = [load(file)["optimizer_state_dict"] for file in files]
        self.model = load(folder / ("zero_pp_rank_0_" * (stage == 3) + "mp_rank_00_model_states.pt"))
        self._sharded_weights = stage == 3
        self.step: Tensor = self._states(0)[0]["step"]
        # {parameter: its pieces in the order of its elements, as (rank, group, first element, elements)}
        self._pieces = self._pieces_of_stage_3(ranks) if stage == 3 else self._pieces_by_name()

    def whole(self, parameter: str, what: str) -> Tensor:
        """One parameter's fp32 weights or one of its moments, flat."""
        pieces = [self._flat(rank, group, what)[start : start + count] for rank, group, start, count in self._pieces[parameter]]
        return torch.cat(pieces)

    def _flat(self, rank: int, group: int, what: str) -> Tensor:
        key = "fp32_flat_groups" if self._sharded_weights else "single_partition_of_fp32_groups"
        flat: Tensor = self._ranks[rank][key][group] if what == WEIGHT else self._states(rank)[group][what]
        return flat

    def _states(self, rank: int) -> dict[int, dict[str, Tensor]]:
        key = "optimizer_state_dict" if self._sharded_weights else "base_optimizer_state"
        states: dict[int, dict[str, Tensor]] = self._ranks[rank][key]["state"]
        return states

    def _pieces_by_name(self) -> dict[str, list[tuple[int, int, int, int]]]:
        """Stages 1 and 2: each file says where in its flat groups it has which parameter."""
        found: dict[str, list[tuple[int, int, int, int]]] = {}
        for rank, state in enumerate(self._ranks):
            for group, addresses in enumerate(state["param_slice_mappings"]):
                for name, address in addresses.items():
                    found.setdefault(name, []).append((rank, group, address.start, address.numel))
        return found

    def _pieces_of_stage_3(self, ranks: int) -> dict[str, list[tuple[int, int, int, int]]]:
        """Stage 3: every rank has an equal part of each parameter, the last ones filled up with zeros."""
        found: dict[str, list[tuple[int, int, int, int]]] = {}
        for group, shapes in enumerate(self.model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                count, part = shape.numel(), -(-shape.numel() // ranks)
                own = [max(0, min(part, count - rank * part)) for rank in range(ranks)]
                found[name] = [(rank, group, start, elements) for rank, elements in enumerate(own) if elements]
                start += part
        return found


def put(engine: Any, shards: Shards, rank: int) -> None:
    """Puts the state of `shards` into a new DeepSpeed engine of any number of ranks; collective under ZeRO-3."""
    zero = engine.optimizer
    names = {id(parameter): name for parameter, name in engine.param_names.items()}
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        flats = zero.fp32_partitioned_groups_flat
        places = [_places_of_stage_3(group, names, rank) for group in zero.fp16_groups]
        weights, optimizer = "fp32_flat_groups", "optimizer_state_dict"
        zero.checkpoint_event_prologue()
    else:
        engine.module.load_state_dict(shards.model["module"])
        flats = zero.single_partition_of_fp32_groups
        places = [_places(group, names) for group in zero.bit16_groups]
        weights, optimizer = "single_partition_of_fp32_groups", "base_optimizer_state"
    state = zero.state_dict()
    state[weights] = [_filled(flat, found, shards, WEIGHT) for flat, found in zip(flats, places, strict=True)]
    state[optimizer]["state"] = {
        group: {"step": shards.step.clone(), **{key: _filled(flat, found, shards, key) for key in MOMENTS}}
        for group, (flat, found) in enumerate(zip(flats, places, strict=True))
    }
    zero.load_state_dict([state] * engine.dp_world_size, load_from_fp32_weights=True)
    if hasattr(zero, "fp16_partitioned_groups_flat"):
        zero.checkpoint_event_epilogue()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, shards.model[key])


Place = tuple[str, int, int, int]  # parameter, its first element here, where that lies in the flat group, elements


def _places(group: list[Any], names: dict[int, str]) -> list[Place]:
    """What of each parameter lies in this rank's flat group, by DeepSpeed's own mapping."""
    mapped = [(names[id(parameter)], parameter._hp_mapping) for parameter in group if parameter._hp_mapping is not None]
    return [
        (name, one.lp_fragment_address.start, one.get_hp_fragment_address().start, one.get_hp_fragment_address().numel)
        for name, one in mapped
    ]


def _places_of_stage_3(group: list[Any], names: dict[int, str], rank: int) -> list[Place]:
    places, start = [], 0
    for parameter in group:
        part = parameter.partition_numel()
        places.append((names[id(parameter)], rank * part, start, max(0, min(part, parameter.ds_numel - rank * part))))
        start += part
    return places


def _filled(like: Tensor, places: list[Place], shards: Shards, what: str) -> Tensor:
    """A flat group of this rank's pieces; what no parameter has stays zero, as DeepSpeed fills it up."""
    flat = torch.zeros(like.numel(), dtype=like.dtype)
    for name, first, start, count in places:
        flat[start : start + count] = shards.whole(name, what)[first : first + count]
    return flat.to(like.device)
