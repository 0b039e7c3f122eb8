"""A small valid study as a dictionary, and how to change it."""

import copy
from typing import Any

VALID: dict[str, Any] = {
    "name": "small",
    "question": "does it plan?",
    "space": [{"decay": ["mamba2", {"simple_decay": [0.9, 0.99]}], "granularity": ["vector", "scalar"]}],
    "sizes": ["nano"],
    "seeds": [1, 2],
    "recipe": {
        "steps": 100,
        "batch_size": 8,
        "seq_len": 64,
        "eval_every": 50,
        "eval_sequences": 16,
        "checkpoint_every": 50,
        "telemetry_every": 10,
    },
    "data": {"source": "sotu", "tokenizer": "bpe-512"},
    "resources": {"workers": 2},
}


def merged(changes: dict[str, Any], base: dict[str, Any] = VALID) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(value, result[key]) if both else copy.deepcopy(value)
    return result
