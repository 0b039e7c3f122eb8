"""The model card: what was measured, on what, against which published number, and what the model is not.

Every figure is one of the trial's result, the study's manifest or the paper's table; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from decay_core.model import state_size
from services.export.finished import Finished
from services.study.published import errata_of, published_rows

TESTED_WITH = "5.23.0"  # transformers, as constraints.txt pins it; a test compares them
ACCURACIES = {
    "held_out_accuracy": "held-out answers that are right",
    "held_out_sequence_accuracy": "held-out sequences without a wrong answer",
}


_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
batch = tokenizer(["The state of"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=20)))
"""
_WITHOUT_TOKENIZER = """\
import torch
from transformers import AutoModelForCausalLM

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokens = torch.tensor([[1, 2, 3]])  # of a generated task: there is no tokenizer
print(model.generate(tokens, max_new_tokens=20))
"""


def model_card(trial: Finished) -> str:
    """README.md of the export."""
    parts = [_head(trial), _loading(trial), _measured(trial), _decay(trial), _published(trial), _training(trial),
             _limits(trial), _origin(trial)]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(trial: Finished) -> str:
    tags = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["linear-attention", "decay"]}
    question = "\n".join(f"> {line}" for line in trial.study.question.strip().splitlines())
    return (
        f"---\n{yaml.safe_dump(tags, sort_keys=False)}---\n\n# {trial.result.name}\n\n"
        f"A Decay Linear Transformer of design point `{trial.config.point.name}` at size {trial.config.size.name}. It is one "
        f"trial of the study `{trial.study.name}`, which asks:\n\n{question}"
    )


def _loading(trial: Finished) -> str:
    code = _WITH_TOKENIZER if trial.text is not None else _WITHOUT_TOKENIZER
    return (
        f"## How to load\n\n```python\n{code}```\n\n"
        f"It needs torch and transformers (tested with {TESTED_WITH}) and nothing else of the project that trained it. "
        "`trust_remote_code=True` runs the Python files of this folder; they are generated from that project's sources, and "
        "each names its own. On a CPU, in fp32, logits are those of the training, bit for bit."
    )


def _measured(trial: Finished) -> str:
    result = trial.result
    shares = ((label, getattr(result, key)) for key, label in ACCURACIES.items())
    rows = [
        ("held-out loss", f"{result.held_out_loss:.4f} nats per token"),
        ("loss of a model that knows token frequencies alone", f"{result.unigram_entropy:.4f} nats per token"),
        ("training loss, last 100 steps", f"{result.train_loss_last_100:.4f} nats per token"),
        *((label, f"{share:.1%}") for label, share in shares if share is not None),
        ("parameters", f"{result.parameters:,}"),
        ("trained on", f"{result.tokens:,} tokens in {result.steps:,} steps"),
        ("vocabulary", f"{result.vocab_size:,} entries, padded to {trial.config.padded_vocab:,}"),
        (
            "state",
            f"{state_size(trial.config, trial.trial.recipe.seq_len):,} numbers for a sequence of a training window's length",
        ),
        ("seed", str(result.seed)),
    ]
    return f"## What was measured\n\n{_table(('', ''), rows)}"


def _decay(trial: Finished) -> str:
    pairs = zip(trial.result.initial_decay_profile, trial.result.decay_profile, strict=True)
    rows = [
        (str(after.layer), f"{before.median:.4f}", f"{after.median:.4f}", f"{after.p25:.4f}", f"{after.p75:.4f}")
        for before, after in pairs
    ]
    if not rows:
        return ""
    head = ("layer", "median before", "median after", "lower quartile", "upper quartile")
    title = "## Decay λ, before and after training"
    return f"{title}\n\nPer layer, over all positions and channels of one held-out text.\n\n{_table(head, rows)}"


def _published(trial: Finished) -> str:
    rows = [row for row in published_rows(trial.config.point, trial.config.size) if row.loss is not None]
    title = "## Published"
    if not rows:
        return f"{title}\n\nThe paper (arXiv 2509.05282) prints no result for this point at this size."
    table = _table(("table", "training loss", "known about the row"),
                   [(row.table, str(row.loss), ", ".join(e.id for e in errata_of(row))) for row in rows])  # fmt: skip
    return (
        f"{title}\n\nWhat the paper (arXiv 2509.05282) prints for this point at this size. Its loss is on other data and more "
        f"tokens: compare it with a trial of the paper's recipe only.\n\n{table}"
    )


def _training(trial: Finished) -> str:
    data = trial.manifest.data
    licence = "none: the data is generated" if trial.text is None else trial.text.licence
    rows = [("data", f"`{data['source']}`: {data['description']}"), ("licence of the data", licence)]
    rows += [(f"data.{key}", f"`{value}`") for key, value in _set(data["spec"]) if key != "source"]
    rows += [(f"recipe.{key}", f"`{value}`") for key, value in _set(trial.trial.recipe.to_dict())]
    return f"## Training\n\n{_table(('', ''), rows)}"


def _limits(trial: Finished) -> str:
    length, spec = trial.trial.recipe.seq_len, trial.manifest.data["spec"]
    lines = [
        "It was trained to compare decay mechanisms. It was not tuned to follow instructions, nor looked at for what it says.",
        f"Texts longer than the {length:,} tokens of a training window were not measured.",
        "Losses in nats per token compare only under the same tokenizer and held-out text.",
        "A batch is padded on the left. Rows of different lengths are read one length after the other.",
        "`use_cache=True` computes no gradient, and what has to go back in the text, such as assisted generation, is refused.",
        "It computes in fp32. `from_pretrained(path, dtype=torch.bfloat16)` keeps the parameters of the decay in fp32; "
        "`model.to(torch.bfloat16)` does not.",
        "The recurrence is plain torch: right on every device, not fast.",
    ]
    if spec.get("boundary") == "none":
        lines.append("No end-of-text token was in its training text, so it does not end a text: set `max_new_tokens`.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _origin(trial: Finished) -> str:
    result = trial.result
    rows = [
        ("trial", f"`{result.trial_id}`"),
        ("SHA-256 of the weights as trained", f"`{result.weights_sha256}`"),
        ("digest of the data", f"`{trial.manifest.data['digest']}`"),
        ("hash of the sample order", f"`{result.order_hash}`"),
    ]
    if trial.changed:
        rows.append(("code that has changed since the training", ", ".join(f"`{name}`" for name in trial.changed)))
    return f"## Where it comes from\n\n{_table(('', ''), rows)}"


def _set(values: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((key, value) for key, value in values.items() if value is not None)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
