"""An export, loaded by transformers in a process that does not have this project, computes what our model computes."""

import json

import pytest
import torch
import torch.nn.functional as F
from exported_points import POINTS, VOCABULARY, config_of
from finished_trial import TEXT
from safetensors.torch import load_file

from decay_core import positions, transitions
from decay_core.model import ModelConfig
from services.data.token_cache import DataSpec, prepare
from services.export.card import TESTED_WITH
from services.export.folder import CARD, WEIGHTS

NAMES = [point.name for point in POINTS]
every_point = pytest.mark.parametrize("name", NAMES)


def greedy(model, tokens, new=8):
    """The likeliest continuation by reading the whole text again for every token."""
    with torch.no_grad():
        for _ in range(new):
            best = model(tokens)[:, -1:, : model.config.vocab_size].argmax(dim=-1)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens


@every_point
def test_logits_are_ours_bit_for_bit_and_ids_that_do_not_exist_are_impossible(exported, name):
    case = exported[name]
    tokens = case.elsewhere["tokens"]
    with torch.no_grad():
        ours = case.model(tokens)
    assert ours.shape[-1] == 256 and ours[..., :VOCABULARY].std() > 0.1
    logits = case.elsewhere["logits"]
    assert torch.equal(logits[..., :VOCABULARY], ours[..., :VOCABULARY])
    assert (logits[..., VOCABULARY:] == -torch.inf).all()
    assert torch.equal(case.elsewhere["last_logits"], case.elsewhere["logits"][:, -2:])
    assert ModelConfig.from_dict(case.elsewhere["config"]) == case.model.config


@every_point
def test_generating_with_the_cache_writes_what_reading_everything_again_writes(exported, name):
    case = exported[name]
    tokens = case.elsewhere["tokens"]
    assert torch.equal(case.elsewhere["greedy"], greedy(case.model, tokens))
    assert torch.equal(case.elsewhere["beams"], case.elsewhere["beams_without_cache"])
    assert case.elsewhere["read"] == tokens.shape[1]
    assert torch.allclose(
        case.elsewhere["cached_logits"][..., :VOCABULARY], case.elsewhere["logits"][..., :VOCABULARY], rtol=0, atol=1e-4
    )


@every_point
def test_a_padded_row_gives_what_it_gives_alone(exported, name):
    case = exported[name]
    tokens, padded = case.elsewhere["tokens"], case.elsewhere["padded_logits"]
    with torch.no_grad():
        shorter, longer = case.model(tokens[:1, 3:]), case.model(tokens[1:])
    assert torch.equal(padded[:1, 3:, :VOCABULARY], shorter[..., :VOCABULARY])
    assert torch.equal(padded[1:, :, :VOCABULARY], longer[..., :VOCABULARY])
    assert torch.equal(case.elsewhere["greedy_padded"][:1, 3:], case.elsewhere["greedy_alone"])
    assert torch.equal(case.elsewhere["greedy_padded"][1], case.elsewhere["greedy"][1])
    assert torch.equal(case.elsewhere["beams_padded"][:1, 3:], case.elsewhere["beams_alone"])
    assert torch.equal(case.elsewhere["right_padded_logits"], case.elsewhere["logits"])


@every_point
def test_the_loss_is_the_one_that_was_trained_and_reaches_every_parameter(exported, name):
    case = exported[name]
    tokens = case.elsewhere["tokens"]
    with torch.no_grad():
        ours = case.model(tokens, F.pad(tokens[:, 1:], (0, 1), value=-100))
    assert abs(case.elsewhere["loss"] - ours) <= 1e-6 * ours
    assert case.elsewhere["trained"] == [f"model.{name}" for name, _ in case.model.named_parameters()]


@every_point
def test_in_bf16_only_matrices_tables_and_gains_are_narrow(exported, name):
    case = exported[name]
    wide = {name for name in case.elsewhere["kept_wide"] if not name.endswith((".weight", ".gain"))}
    own = {f"model.{name}" for name, _ in case.model.named_parameters() if not name.endswith((".weight", ".gain"))}
    assert wide == own and set(case.elsewhere["kept_wide"]) == own
    difference = (case.elsewhere["bf16_logits"] - case.elsewhere["logits"])[..., :VOCABULARY]
    assert difference.abs().mean() < 0.1 * case.elsewhere["logits"][..., :VOCABULARY].std()


def test_some_parameters_stay_wide_in_bf16(exported):
    wide = {name for case in exported.values() for name in case.elsewhere["kept_wide"]}
    assert {name.rsplit(".", 1)[-1] for name in wide} >= {"log_rate", "step_bias", "offset", "logits", "decay_logit"}


@every_point
def test_what_is_not_supported_is_refused_in_one_line(exported, name):
    expected = [
        "pad on the left",
        "computes no gradient",
        "output_attentions is not supported",
        "what this model returned",
        "input_ids with at least one token",
        "none between",
        "cannot be resized",
        "not supported with stateful",
    ]
    refusals = exported[name].elsewhere["refusals"]
    assert len(refusals) == len(expected)
    for line, words in zip(refusals, expected, strict=True):
        assert words in line and "\n" not in line


@every_point
def test_saving_again_keeps_every_bit_and_the_code(exported, name):
    case = exported[name]
    again = case.folder.parents[1] / "again" / name
    first, second = load_file(case.folder / WEIGHTS), load_file(again / WEIGHTS)
    assert set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())
    code = [path for path in case.folder.glob("*.py")]
    assert code and all((again / path.name).read_bytes() == path.read_bytes() for path in code)
    # not aligned any more, so the last bits of a product may differ
    ours, theirs = (case.elsewhere[key][..., :VOCABULARY] for key in ("logits", "logits_after_saving_again"))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@every_point
def test_weights_keep_their_bits_get_a_prefix_and_lie_where_torch_would_put_them(exported, name):
    case = exported[name]
    assert case.elsewhere["misplaced"] == []
    weights = load_file(case.folder / WEIGHTS)
    ours = case.model.state_dict()
    assert {f"model.{name}" for name in ours} == set(weights)
    assert all(torch.equal(weights[f"model.{name}"], value) for name, value in ours.items())


def test_the_tokenizer_gives_the_tokens_of_the_training_and_never_the_mark_for_its_characters(exported, tmp_path):
    found = exported["trial"].elsewhere["tokenizer"]
    (tmp_path / "text.txt").write_text(TEXT)
    cache = prepare(DataSpec(source=str(tmp_path / "text.txt"), tokenizer="bpe-300"), tmp_path / "data", progress=False)
    ours = cache.tokenizer()
    assert "<|endoftext|>" in "".join(found["given"])
    assert found["ids"] == [ours.encode(text).ids for text in found["given"]]
    assert found["texts"] == found["given"] and found["entries"] == 300
    assert found["special"] == ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", "left")
    assert all(text in written for text, written in zip(found["given"], found["written"], strict=True))


def test_the_example_on_the_card_runs_as_it_stands(exported):
    assert "The state of" in exported["trial"].elsewhere["card_example"]


def test_without_a_tokenizer_none_is_written(exported):
    files = {path.name for path in exported[NAMES[0]].folder.iterdir()}
    assert {"config.json", "generation_config.json", WEIGHTS, CARD, "modeling_decay.py"} <= files
    assert not {name for name in files if "tokenizer" in name}


def test_generation_ends_at_the_mark_of_the_tokenizer(exported):
    trial = json.loads((exported["trial"].folder / "generation_config.json").read_text())
    assert trial == {"bos_token_id": 299, "eos_token_id": 299, "pad_token_id": 299}
    assert json.loads((exported[NAMES[0]].folder / "generation_config.json").read_text()) == {}


def test_the_card_names_the_transformers_that_is_pinned(root):
    pinned = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("transformers==")]
    assert pinned == [f"transformers=={TESTED_WITH}"]


def test_the_points_cover_every_axis():
    configs = [config_of(point) for point in POINTS]
    for config in configs:
        config.check()
    assert {point.granularity for point in POINTS} == {"vector", "paired", "scalar"}
    assert {point.share for point in POINTS} == {True, False}
    assert {point.position for point in POINTS} == set(positions.names()) and {point.transition for point in POINTS} == set(
        transitions.names()
    )
