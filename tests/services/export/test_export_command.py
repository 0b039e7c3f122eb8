"""`decay export` writes all of a finished trial or nothing, and refuses in one line what it cannot vouch for."""

import hashlib
import json
import shutil
import sys

import pytest
from finished_trial import LOSS, MEDIANS, UNIGRAM, finish, write_study
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from services.cli import app, main
from services.export import folder as folder_module
from services.study.file import read_study
from services.study.ledger import Ledger
from services.study.plan import make_plan
from services.study.storage import Storage

WHOLE = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "modeling_decay.py", "chosen_variants.py", "decay_core_model.py", "kernels_select_kernel.py",
}  # fmt: skip


class Made:
    """A study with one finished trial, and the command."""

    def __init__(self, home):
        self.home, self.file = home, home / "study.yaml"
        self.plan = make_plan(read_study(self.file))
        self.trial, self.storage = self.plan.trials[0], Storage(str(home / "runs" / "made"))
        self.folder, self.target = home / "runs" / "made" / "trials" / self.trial.id, home / "out" / "model"

    def export(self, *words, trial=None, to=None):
        command = [
            "export",
            str(self.file),
            self.trial.name if trial is None else trial,
            "--to",
            str(to or self.target),
            *words,
        ]
        return CliRunner().invoke(app, command)

    def refusal(self, *words, **options):
        """The one line of a refusal, after which nothing lies at the target."""
        answer = self.export(*words, **options)
        assert isinstance(answer.exception, ValueError), answer.output
        assert type(answer.exception).__module__.startswith("services.")
        line = str(answer.exception)
        assert "\n" not in line
        return line

    def edit(self, name, change):
        """Changes a JSON file of the study."""
        values = json.loads(self.storage.read(name))
        change(values)
        values.pop("sha256", None)
        self.storage.write(name, json.dumps(values).encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    finish(write_study(home))
    return home


@pytest.fixture
def made(whole, tmp_path):
    """A fresh copy of the study; its token cache stays where it was made."""
    shutil.copytree(whole / "runs" / "made", tmp_path / "runs" / "made")
    text = (whole / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace(str(whole / "runs"), str(tmp_path / "runs")))
    return Made(tmp_path)


def test_an_export_holds_all_that_transformers_looks_for(made):
    answer = made.export()
    assert (answer.exit_code, answer.output.strip()) == (0, str(made.target))
    assert {path.name for path in made.target.iterdir()} >= WHOLE
    assert [path.name for path in made.target.parent.iterdir()] == ["model"]
    config = json.loads((made.target / "config.json").read_text())
    assert config["model_type"] == "decay" and config["vocab_size"] == 512
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_decay.DecayForCausalLM"


def test_the_default_folder_is_named_after_the_trial(made, monkeypatch):
    monkeypatch.chdir(made.home)
    answer = CliRunner().invoke(app, ["export", str(made.file), made.trial.id[:8]])
    assert answer.output.strip() == f"exports/{made.trial.name}"
    assert (made.home / "exports" / made.trial.name / "config.json").is_file()


def test_the_card_says_what_was_measured_and_on_what(made):
    made.export()
    card = (made.target / "README.md").read_text()
    for words in (
        f"# {made.trial.name}", f"{LOSS:.4f} nats", f"{UNIGRAM:.4f} nats", f"| 1 | {MEDIANS[0][0]:.4f} | {MEDIANS[0][1]:.4f} |",
        f"| 2 | {MEDIANS[1][0]:.4f} | {MEDIANS[1][1]:.4f} |", "> Is a hand-made trial\n> exported?", "made by a test",
        "licence of the data | unknown", "recipe.lr | `0.0003`", "prints no result for this point", "set `max_new_tokens`",
        "32 tokens of a training window", "640 tokens in 10 steps", made.trial.id, "AutoTokenizer.from_pretrained",
        "bit for bit",
    ):  # fmt: skip
        assert words in card, words
    assert "changed since the training" not in card


def test_a_refusal_is_one_line_and_exit_code_2(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decay", "export", str(made.file), "nothing-like-it"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "decay: study 'made' has no trial 'nothing-like-it'; decay status lists the names and ids\n"
    )


def test_a_word_that_stands_for_several_trials_is_refused(made):
    line = made.refusal(trial="")
    assert "'' stands for 4 trials of study 'made'; give more of the id, or the name" in line


@pytest.mark.parametrize("index", [1, 2])
def test_an_unfinished_trial_is_refused_with_its_state(made, index):
    other = made.plan.trials[index]
    if index == 2:
        Ledger(made.storage).append("attempt", other.id)
    line = made.refusal(trial=other.name)
    assert f"trial {other.name} is {'started' if index == 2 else 'waiting'}; only a finished trial can be exported" in line
    assert not made.target.exists()


def test_a_study_that_never_ran_is_refused(made):
    shutil.rmtree(made.home / "runs")
    assert "has not started" in made.refusal()


def test_weights_that_are_not_those_of_the_result_are_refused(made):
    path = made.folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "have SHA-256" in made.refusal() and not made.target.exists()


def test_weights_that_todays_code_does_not_have_are_refused(made):
    path = made.folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["head.bias"] = weights.pop("head.weight")
    data = save(weights)
    path.write_bytes(data)
    made.edit(
        f"trials/{made.trial.id}/result.json", lambda values: values.update(weights_sha256=hashlib.sha256(data).hexdigest())
    )
    assert "head.bias is not what this version's code computes with" in made.refusal()
    assert not made.target.parent.exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("model/model.safetensors", "are gone although the trial is finished"),
        ("model/config.json", "cannot be read"),
        ("result.json", "is gone although the trial is finished"),
    ],
)
def test_a_file_that_is_gone_is_named(made, name, words):
    (made.folder / name).unlink()
    line = made.refusal()
    assert words in line and name in line


def test_a_token_cache_that_is_gone_is_named(made, tmp_path):
    made.edit("study.json", lambda values: values["data"].update(path=str(tmp_path / "nowhere")))
    assert f"{tmp_path / 'nowhere'} is not on this machine" in made.refusal()


def test_a_token_cache_with_other_tokens_is_refused(made):
    made.edit("study.json", lambda values: values["data"].update(digest="0" * 64))
    assert "other tokens than the study was trained on" in made.refusal()


def test_a_token_cache_that_moved_with_its_storage_is_found(made, whole):
    (place,) = [path for path in (whole / "runs" / "data").iterdir() if path.is_dir()]
    shutil.copytree(place, made.home / "runs" / "data" / place.name)
    made.edit("study.json", lambda values: values["data"].update(path=f"/elsewhere/{place.name}"))
    assert made.export().exit_code == 0


def test_generated_data_has_no_tokenizer_and_the_card_says_so(made):
    made.edit("study.json", lambda values: values["data"].update(source="recall:mqar", spec={"source": "recall:mqar"}))
    assert made.export().exit_code == 0
    card = (made.target / "README.md").read_text()
    assert "there is no tokenizer" in card and "none: the data is generated" in card and "AutoTokenizer" not in card
    assert not [path for path in made.target.iterdir() if "tokenizer" in path.name]


def test_code_that_has_changed_since_the_training_is_named_on_the_card(made):
    def older(values):
        values["mechanism"]["decay_core/mixer.py"] = "0" * 64

    made.edit(f"trials/{made.trial.id}/result.json", older)
    made.export()
    assert "code that has changed since the training | `decay_core/mixer.py` |" in (made.target / "README.md").read_text()


def test_a_folder_that_holds_something_stays_as_it_is(made):
    made.target.mkdir(parents=True)
    made.export()  # an empty folder may be filled
    (made.target / "mine.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in made.target.iterdir()}
    assert "holds files already" in made.refusal()
    assert {path.name: path.read_bytes() for path in made.target.iterdir()} == before
    assert made.export("--overwrite").exit_code == 0
    assert {path.name for path in made.target.iterdir()} == set(before) - {"mine.txt"}


def test_overwriting_replaces_exports_only(made):
    made.target.mkdir(parents=True)
    (made.target / "thesis.tex").write_text("years of work")
    assert "is no export and stays" in made.refusal("--overwrite")
    assert (made.target / "thesis.tex").read_text() == "years of work"
    (made.home / "file").write_text("a file")
    assert "is a file" in made.refusal("--overwrite", to=made.home / "file")


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_what_was_there(made, monkeypatch, there):
    if there:
        made.export()
    before = {path.name: path.read_bytes() for path in made.target.iterdir()} if there else {}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "copy_weights", full)
    assert isinstance(made.export("--overwrite").exception, OSError)
    assert [path.name for path in made.target.parent.iterdir()] == (["model"] if there else [])
    assert ({path.name: path.read_bytes() for path in made.target.iterdir()} if there else {}) == before
