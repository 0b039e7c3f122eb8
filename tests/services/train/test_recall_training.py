"""Recall tasks go through the same loop as text, and what it says of their accuracy is what the final weights answer."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_training import GRIDS, REASSOCIATION_NATS, largest_difference

from decay_core.model import ModelConfig, build_model
from services.data.corpus import spec_of
from services.data.recall import RecallData

pytestmark = pytest.mark.slow

INDUCTION = {"source": "induction", "recall": {"vocab_size": 16}}
PAIRS = {"source": "mqar", "recall": {"vocab_size": 32, "pairs": 4, "queries": 3}}
LEARN = {"steps": 80, "batch_size": 64, "seq_len": 12, "eval_every": 40, "eval_sequences": 101, "checkpoint_every": 80}


def answers_of(outcome, task, recipe):
    """Loss, share of right answers and of right sequences of the exported weights, computed here."""
    config = ModelConfig.from_dict(json.loads((outcome.folder / "model" / "config.json").read_text()))
    model = build_model(config)
    model.load_state_dict(load_file(outcome.folder / "model" / "model.safetensors"))
    stream = RecallData(spec_of(task), outcome.folder).held_out
    examples = [stream.example(i, recipe["seq_len"]) for i in range(recipe["eval_sequences"])]
    tokens, targets = (torch.stack([torch.from_numpy(rows[part]) for rows in examples]) for part in (0, 1))
    with torch.no_grad():
        logits = model(tokens)
    asked = targets >= 0
    loss = torch.nn.functional.cross_entropy(logits[asked], targets[asked])
    right = logits[asked][:, : config.vocab_size].argmax(-1) == targets[asked]
    return float(loss), float(right.float().mean()), float(right.reshape(len(tokens), -1).all(1).float().mean())


def test_induction_is_learnt_and_pairs_give_the_same_on_two_ranks_under_zero_3(train):
    short = {"seq_len": 18, "eval_sequences": 7}
    learnt, one = train(
        {"name": "induction", "task": INDUCTION, "grid": GRIDS["llama"], "recipe": LEARN},
        {"name": "one", "task": PAIRS, "recipe": short},
    )
    assert learnt.result["held_out_accuracy"] > 0.5
    assert learnt.result["unigram_entropy"] == math.log(15) > learnt.result["held_out_loss"]
    assert learnt.result["state_size"] == 2 * 12 * 2 * 128  # layers, tokens, keys and values, width
    assert [step["held_out/accuracy"] for step in learnt.steps if "held_out/accuracy" in step][1] == pytest.approx(
        learnt.result["held_out_accuracy"]
    )
    for outcome, task, recipe in ((learnt, INDUCTION, LEARN), (one, PAIRS, short)):
        loss, accuracy, whole = answers_of(outcome, task, recipe)
        assert outcome.result["held_out_loss"] == pytest.approx(loss, abs=REASSOCIATION_NATS)
        assert outcome.result["held_out_accuracy"] == pytest.approx(accuracy, abs=1e-6)
        assert outcome.result["held_out_sequence_accuracy"] == pytest.approx(whole, abs=1e-6)
    (two,) = train({"name": "two", "task": PAIRS, "recipe": short, "workers": 2, "zero_stage": 3, "micro_batch_size": 2})
    assert largest_difference(one, two) <= REASSOCIATION_NATS
    assert two.result["held_out_loss"] == pytest.approx(one.result["held_out_loss"], abs=REASSOCIATION_NATS)
    for key in ("held_out_accuracy", "held_out_sequence_accuracy", "order_hash", "state_size"):
        assert two.result[key] == one.result[key], key


def test_a_killed_recall_trial_goes_on_with_the_same_bits(train):
    how = {"task": PAIRS, "recipe": {"seq_len": 16, "eval_every": 4}}
    train({"name": "killed", **how}, kill_at=7)
    resumed, quiet = train({"name": "killed", **how}, {"name": "quiet", **how})
    same = ("weights_sha256", "held_out_accuracy", "held_out_loss", "order_hash")
    assert {key: resumed.result[key] for key in same} == {key: quiet.result[key] for key in same}
    assert resumed.losses == quiet.losses
