"""The points that are exported by the tests, and how a script runs without this project."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decay_core.design import DesignPoint
from decay_core.model import DecayLinearTransformer, ModelConfig
from decay_core.sizes import Size

HERE = Path(__file__).parent
SIZE = Size(name="tiny", d_model=32, layers=2, heads=2, glu_dim=24)
VOCABULARY = 50
SCALAR: dict[str, Any] = {"granularity": "scalar"}
POINTS = [
    DesignPoint(decay="mamba2", position="lrpe_half"),
    DesignPoint(decay="simple_decay", p=0.99, share=True, position="lrpe"),
    DesignPoint(decay="hgrn2", granularity="paired", position="rope"),
    DesignPoint(decay="lightnet", share=True, position="tpe", form="as_run"),
    DesignPoint(decay="tnl", position="rope", form="as_run", **SCALAR),
    DesignPoint(decay="gla", position="rope_half", **SCALAR),
    DesignPoint(decay="simple_decay", p=0.9, transition="delta", form="as_run"),
    DesignPoint(decay="none", position="rope", transition="softmax", **SCALAR),
]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Exported:
    """A model, and what was computed with its export elsewhere."""

    model: DecayLinearTransformer
    folder: Path
    elsewhere: dict[str, Any]


def alone(script: str, *words: Path, home: Path) -> None:
    """Runs a script of this folder in an isolated Python that keeps its caches below `home`."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    env = kept | OFFLINE | {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-I", str(HERE / script), *map(str, words)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def config_of(point: DesignPoint) -> ModelConfig:
    """A model small enough for a test."""
    return ModelConfig(point=point, size=SIZE, vocab_size=VOCABULARY)
