"""What is known about a complete token cache: `manifest.json`, its digest and the figures of its token frequencies.

The digest stands for what a model will see. Paths, times and versions of libraries are in the manifest to be read,
and out of the digest, so that two machines that made the same tokens agree.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.data.shards import SPLITS, CacheError

FORMAT = 1
MANIFEST = "manifest.json"


def digest(manifest: dict[str, Any]) -> str:
    """sha256 over the content that decides what a model sees: no path, no time, no library version."""
    spec = {key: manifest["spec"][key] for key in ("boundary", "held_out_percent", "max_documents")}
    content = {
        "format": manifest["format"],
        "dtype": manifest["dtype"],
        "spec": spec,
        "tokenizer": manifest["tokenizer"]["sha256"],
        "held_out_documents": manifest["held_out"]["documents_sha256"],
        "shards": [[record[split]["sha256"] for split in SPLITS] for record in manifest["shards"]],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises CacheError where there is none, or it was changed after it was written."""
    file = path / MANIFEST
    if not file.is_file():
        raise CacheError(f"token cache {path}: not there or not complete ({MANIFEST} is missing); prepare it (again)")
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        good = manifest["format"] == FORMAT and manifest["digest"] == digest(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise CacheError(f"token cache: {file} is damaged or of another version; delete the folder and prepare again")
    return manifest


def unigram_figures(train: NDArray[np.int64], held_out: NDArray[np.int64]) -> dict[str, float | None]:
    """What a model without context reaches, in nats per token, from counts [entries]; None where nothing is held out.

    The cross-entropy scores the held-out tokens by the training frequencies with one added to every count.
    """
    predicted = np.log(train + 1.0) - np.log(train.sum() + float(len(train)))
    some = bool(held_out.sum())
    return {
        "unigram_entropy_nats": _cross_entropy(held_out, _log_share(held_out)) if some else None,
        "train_unigram_entropy_nats": _cross_entropy(train, _log_share(train)),
        "unigram_cross_entropy_nats": _cross_entropy(held_out, predicted) if some else None,
    }


def _log_share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.maximum(counts, 1) / counts.sum()  # ids that never occur get weight 0 below
    return np.log(shares)


def _cross_entropy(counts: NDArray[np.int64], log_p: NDArray[np.float64]) -> float:
    return float(-(counts * log_p).sum() / counts.sum())
