"""With this project at hand, transformers' Auto classes know the model after `register()`, and build what we build."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from decay_core.design import DesignPoint
from decay_core.hub import DecayCache, DecayConfig, DecayForCausalLM, register
from decay_core.model import ModelConfig, build_model
from decay_core.sizes import Size

CONFIG = ModelConfig(
    point=DesignPoint(decay="hgrn2"), size=Size(name="tiny", d_model=16, layers=2, heads=2, glu_dim=8), vocab_size=50
)


def test_a_model_that_is_built_has_the_weights_of_its_seed_and_leaves_the_global_random_state():
    register()
    state = torch.get_rng_state()
    built = AutoModelForCausalLM.from_config(DecayConfig(design=CONFIG.to_dict(), seed=7))
    ours = build_model(CONFIG, seed=7)
    assert isinstance(built, DecayForCausalLM)
    assert all(torch.equal(built.model.state_dict()[name], value) for name, value in ours.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_from_this_project_it_loads_without_remote_code(tmp_path):
    register()
    built = AutoModelForCausalLM.from_config(DecayConfig(design=CONFIG.to_dict(), seed=7))
    built.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ModelConfig.from_dict(AutoConfig.from_pretrained(tmp_path).design) == CONFIG
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in built.state_dict().items())


def test_what_follows_from_the_design_cannot_be_said_otherwise():
    assert DecayConfig(design=CONFIG.to_dict(), vocab_size=256).vocab_size == 256
    with pytest.raises(ValueError, match="vocab_size follows from the design of this model and is 256"):
        DecayConfig(design=CONFIG.to_dict(), vocab_size=50)
    with pytest.raises(ValueError, match="has no design"):
        DecayConfig().to_model_config()


def test_rows_of_a_cache_can_be_chosen_across_lengths():
    model = DecayForCausalLM(DecayConfig(design=CONFIG.to_dict())).eval()
    tokens = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1] * 5])
    cache = model(tokens[:, :5], attention_mask=mask, use_cache=True).past_key_values
    assert isinstance(cache, DecayCache) and len(cache.groups) == 2 and cache.get_seq_length() == 5
    rows = torch.tensor([1, 0, 1, 1])
    chosen = model(tokens[rows, 5:], past_key_values=cache.select(rows)).logits
    expected = model(tokens[:, 5:], past_key_values=cache).logits[rows]
    assert torch.allclose(chosen[..., :50], expected[..., :50], rtol=0, atol=1e-6)


def test_a_tuple_is_returned_where_one_is_asked_for():
    model = DecayForCausalLM(DecayConfig(design=CONFIG.to_dict())).eval()
    tokens = torch.tensor([[1, 2, 3]])
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert loss.shape == () and logits.shape == (1, 3, 256)


def test_the_rest_of_the_project_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import decay_core.model, services.cli, services.export.export_trial; "
        "from decay_core.design import DesignPoint; from services.export.modelling_code import modelling_code; "
        "assert 'modeling_decay.py' in modelling_code(DesignPoint(decay='gla'))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_page_s_example_builds_a_model_beside_this_project(root):
    _, example = re.findall(r"^```python\n(.*?)^```$", (root / "docs" / "export.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(example, names)
    assert isinstance(names["model"], DecayForCausalLM) and names["model"].config.seed == 42
