"""Triton's autotuning taken in hand: candidates compiled by many processes at once, timed once, and kept for every later shape.

A rival that tunes itself needs minutes at its first call, nearly all of it compiling. Here that takes three steps, each a mode:

    compile    every process compiles its share of the candidates; no kernel runs
    tune       one process times the candidates, compiled already, and keeps the best of each kernel in a file
    pinned     kernels take what the file says, at any shape

What is surprising:
- The best candidate is kept by kernel, flags and dtypes, without the dims: tuned at one shape, used at all. Where it does not
  serve other dims (too much shared memory, or the kernel's own rules forbid it), a few candidates near it are timed there and a
  remark says so.
- A candidate that makes the GPU fault ends the process. It is written down before, so that the next process leaves it out.
Source: Triton 3.6, runtime/autotuner.py, whose `run` is replaced.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = Any  # triton.Config
FEW = 4  # candidates where there is no time for all
FAULTS = ("illegal", "misaligned", "unspecified launch failure", "device-side assert", "uncorrectable")


class DeviceFault(RuntimeError):
    """The process's GPU context is lost; another process can go on."""


def is_fault(error: BaseException) -> bool:
    """Whether the GPU context is lost with this error."""
    said = str(error).lower()
    return isinstance(error, DeviceFault) or ("cuda" in said and any(word in said for word in FAULTS))


@dataclass(kw_only=True)
class Tuning:
    """What is done at a kernel's first call for given dims, and what is known already, in `file`.

    share: (which, of how many) of the candidates this process compiles. few: candidates per kernel at most.
    """

    mode: str
    file: Path
    share: tuple[int, int] = (0, 1)
    few: int | None = None
    bench: Callable[[Callable[[], Any]], float] | None = None
    remark: Callable[[str], None] = print
    pins: dict[str, dict[str, Any]] = field(default_factory=dict)
    banned: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    configs: int = 0
    failed: int = 0
    _counter: int = 0
    _seen: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.turn_to(self.file)

    def turn_to(self, file: Path) -> None:
        """Goes on with another contestant's file; shares go on in turn."""
        self.file, self.seconds, self.configs, self.failed = file, 0.0, 0, 0
        kept = json.loads(file.read_text()) if file.exists() else {}
        self.pins, self.banned = kept.get("pins", {}), kept.get("banned", [])

    def save(self) -> None:
        """Writes what is known, in one step."""
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        beside.write_text(json.dumps({"pins": self.pins, "banned": self.banned}, indent=1))
        beside.replace(self.file)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces Triton's way of tuning. What was decided stays decided afterwards, at Triton's own cost per call."""
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        tune, launch, mine = Autotuner.run, JITFunction.run, self

        def run(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            return mine.run(tuner, tune, args, kwargs)

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            return launch(kernel, *args, grid=grid, warmup=True, **kwargs)

        Autotuner.run = run
        if self.mode == "compile":
            JITFunction.run = compile_only
        try:
            yield
        finally:
            Autotuner.run, JITFunction.run = tune, launch

    def run(self, tuner: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a tuned kernel."""
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        key = _key(tuner, kwargs)
        if self.mode == "compile":
            if (self.file, id(tuner), key) not in self._seen:
                self._seen.add((self.file, id(tuner), key))
                self._compile(tuner, args, kwargs)
            return None
        if len(tuner.configs) == 1:
            return original(tuner, *args, **kwargs)
        pinned = key not in tuner.cache and self._decide(tuner, key, args, kwargs)
        try:
            return original(tuner, *args, **kwargs)
        except Exception as error:
            if not pinned or is_fault(error):
                raise
            self.remark(f"{_name(tuner, kwargs)}: what was kept does not run here ({type(error).__name__}), tuned anew")
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        left = [c for c in self._allowed(tuner, kwargs) if _described(c) != _described(tuner.cache[key])]
        self._measure(tuner, key, nearest(left, tuner.cache[key], FEW), args, kwargs)
        return original(tuner, *args, **kwargs)

    def _compile(self, tuner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = self._pinned(tuner, kwargs)
        which, of = self.share
        for config in [found] if found is not None else self._candidates(tuner, kwargs):
            self._counter += 1
            if self._counter % of != which:
                continue
            started = time.perf_counter()
            try:
                kernel = tuner.fn.run(*args, **{**kwargs, **config.all_kwargs()})
                kernel._init_handles()  # its launcher too is compiled at the first call
            except Exception:
                self.failed += 1  # too large for this GPU: found out again when it is timed
            self.configs += 1
            self.seconds += time.perf_counter() - started

    def _decide(self, tuner: Any, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Fills the tuner's cache for these dims; returns whether by what was kept from others."""
        found = self._pinned(tuner, kwargs)
        if found is not None:
            tuner.cache[key] = found
            return True
        name = _name(tuner, kwargs)
        candidates = self._candidates(tuner, kwargs)
        if self.mode == "pinned":
            why = "may not use what was kept" if name in self.pins else "was not tuned"
            self.remark(f"{name} {why} at these dims: {len(candidates)} candidates timed there")
        self._measure(tuner, key, candidates, args, kwargs)
        return False

    def _measure(self, tuner: Any, key: Any, candidates: list[Config], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, started = _name(tuner, kwargs), time.perf_counter()
        times = {_described(config): self._time(tuner, config, name, args, kwargs) for config in candidates}
        best = min(candidates, key=lambda config: times[_described(config)])
        if times[_described(best)] == math.inf:
            raise RuntimeError(f"{name}: none of {len(candidates)} candidates runs")
        tuner.cache[key] = best
        tuner.pre_hook({**tuner.nargs, **kwargs, **best.all_kwargs()}, reset_only=True)
        self.configs += len(candidates)
        self.seconds += time.perf_counter() - started
        if self.mode == "tune":
            self.pins[name] = {"config": _described(best), "ms": times[_described(best)], "candidates": len(candidates)}
            self.save()

    def _time(self, tuner: Any, config: Config, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Milliseconds, infinite where it does not run."""
        if self.bench is not None:
            tuner.__dict__["do_bench"] = lambda call, quantiles: [self.bench(call)] * 3
        try:
            return float(tuner._bench(*args, config=config, **kwargs)[0])
        except Exception as error:
            self.failed += 1
            if not is_fault(error):
                return math.inf
            self.banned.append([name, _described(config)])
            self.save()
            raise DeviceFault(f"{name} with {_described(config)}: {error}") from error

    def _pinned(self, tuner: Any, kwargs: dict[str, Any]) -> Config | None:
        kept = self.pins.get(_name(tuner, kwargs))
        allowed = [] if kept is None else self._allowed(tuner, kwargs)
        return next((config for config in allowed if _described(config) == kept["config"]), None)

    def _candidates(self, tuner: Any, kwargs: dict[str, Any]) -> list[Config]:
        allowed, kept = self._allowed(tuner, kwargs), self.pins.get(_name(tuner, kwargs), {})
        if self.few is None:
            return allowed
        return nearest(allowed, next((c for c in tuner.configs if _described(c) == kept.get("config")), None), self.few)

    def _allowed(self, tuner: Any, kwargs: dict[str, Any]) -> list[Config]:
        """What the kernel's own rules leave for these arguments, without what made the GPU fault."""
        name = _name(tuner, kwargs)
        return [c for c in tuner.prune_configs(kwargs) if [name, _described(c)] not in self.banned]


def nearest(configs: list[Config], to: Config | None, count: int) -> list[Config]:
    """The `count` configurations nearest to one; without one, spread evenly over the list."""
    if to is None:
        step = max(1, math.ceil(len(configs) / count))
        return configs[step // 2 :: step][:count] or configs[:count]
    return sorted(configs, key=lambda config: _distance(config, to))[:count]


def _distance(one: Config, other: Config) -> float:
    """How many doublings lie between them; pipeline stages weigh least."""
    warps = abs(math.log2(one.num_warps / other.num_warps))
    sizes = sum(
        abs(math.log2(value / other.kwargs[name]))
        for name, value in one.kwargs.items()
        if isinstance(value, int) and value > 0 and isinstance(other.kwargs.get(name), int) and other.kwargs[name] > 0
    )
    return warps + sizes + 0.25 * abs(one.num_stages - other.num_stages)


def _described(config: Config) -> str:
    return json.dumps({"warps": config.num_warps, "stages": config.num_stages, **config.kwargs}, sort_keys=True, default=str)


def _named(tuner: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**tuner.nargs, **kwargs}.items() if name in tuner.arg_names}


def _key(tuner: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton keys its own cache with."""
    named = _named(tuner, kwargs)
    keyed = [named[name] for name in tuner.keys if name in named]
    return (*keyed, *(str(value.dtype) for value in named.values() if hasattr(value, "dtype")))


def _name(tuner: Any, kwargs: dict[str, Any]) -> str:
    """The kernel, its flags and its tensors' dtypes, without any size."""
    named = _named(tuner, kwargs)
    flags = [f"{name}={named[name]}" for name in tuner.keys if isinstance(named.get(name), bool)]
    dtypes = [str(value.dtype).removeprefix("torch.") for value in named.values() if hasattr(value, "dtype")]
    return " ".join([tuner.base_fn.__name__, *flags, *dtypes])
