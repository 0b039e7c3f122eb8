"""An export on the disk: config, weights, tokenizer, card and code, all there or none.

What is unusual: nothing here needs transformers; the files are what its `from_pretrained` looks for. The folder is written
under another name beside its place and renamed. Weights keep their bits, only their names get the prefix of the class that
wraps the model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from decay_core.model import ModelConfig, build_model
from services.data.tokenizers import END_OF_TEXT
from services.export.modelling_code import MODELLING, ExportError, modelling_code
from services.export.weights import copy_weights, read_header
from services.study.storage import fsync_folder

PREFIX = "model."  # where decay_core/hub.py keeps the model
WEIGHTS, CARD, CONFIG = "model.safetensors", "README.md", "config.json"
MODEL_TYPE, CONFIG_CLASS, MODEL_CLASS = "decay", "DecayConfig", "DecayForCausalLM"  # as decay_core/hub.py calls them


@dataclass(frozen=True, kw_only=True)
class Export:
    """What goes into the folder. `weights` is a safetensors file of the bare model; without a tokenizer none is written."""

    config: ModelConfig
    weights: Path
    card: str
    tokenizer: Tokenizer | None = None


def write_export(export: Export, target: Path, overwrite: bool = False) -> list[str]:
    """Writes the folder `target` and returns the names of its files.

    Raises ExportError where the target holds something, and `overwrite` is not given or it is no export; and where the
    weights are not those of the configuration.
    """
    _check_target(target, overwrite)
    _check_weights(export)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    draft, old = (target.with_name(f".{target.name}.{mark}.{ending}") for ending in ("tmp", "old"))
    draft.mkdir()
    try:
        _write_files(export, draft)
        if target.exists():
            os.rename(target, old)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    fsync_folder(target.parent)
    return sorted(path.name for path in target.iterdir())


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.name:
        raise ExportError(f"{str(target)!r} names no folder to write; give another with --to")
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file; give a folder with --to")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ExportError(f"{target} holds files already; give another folder with --to, or --overwrite")
    if not (target / f"{MODELLING}.py").is_file():
        raise ExportError(f"{target} holds something that is no export and stays; give another folder with --to")


def _write_files(export: Export, folder: Path) -> None:
    texts = modelling_code(export.config.point)
    texts |= {CONFIG: _json(config_json(export.config)), CARD: export.card}
    texts["generation_config.json"] = _json(generation_json(export.tokenizer))
    if export.tokenizer is not None:
        texts["tokenizer.json"] = export.tokenizer.to_str()
        texts["tokenizer_config.json"] = _json(tokenizer_json())
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    copy_weights(export.weights, folder / WEIGHTS, PREFIX)
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    fsync_folder(folder)


def _check_weights(export: Export) -> None:
    there = {name: tuple(entry["shape"]) for name, entry in read_header(export.weights).items()}
    model = build_model(export.config, device="meta")
    needed = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = sorted(name for name in there.keys() | needed.keys() if there.get(name) != needed.get(name))
    if wrong:
        raise ExportError(
            f"weights {export.weights}: {wrong[0]} is not what this version's code computes with; "
            "export with the version of this project that trained them"
        )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json: the design, what others look for in such a file, and where the classes are."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [MODEL_CLASS],
        "auto_map": {"AutoConfig": f"{MODELLING}.{CONFIG_CLASS}", "AutoModelForCausalLM": f"{MODELLING}.{MODEL_CLASS}"},
        "dtype": "float32",
        "design": config.to_dict(),
        "vocab_size": config.padded_vocab,
        "hidden_size": config.size.d_model,
        "num_hidden_layers": config.size.layers,
        "num_attention_heads": config.heads,
        "tie_word_embeddings": False,
    }


def generation_json(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: texts begin, end and are padded with the one special token."""
    if tokenizer is None:
        return {}
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def tokenizer_json() -> dict[str, Any]:
    """tokenizer_config.json: padding on the left, as a recurrent state needs it; the mark's characters in a text are text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
