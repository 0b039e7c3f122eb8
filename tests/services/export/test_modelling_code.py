"""The modelling code of an export is the project's own, complete, and the same for every design point that is valid."""

import ast
import hashlib
import re
import sys

import pytest
import torch
from exported_points import alone, config_of
from finished_trial import shaken

from decay_core import decays, positions, transitions
from decay_core.design import FORMS, GRANULARITIES, DesignPoint, Refusal
from services.export import modelling_code as module
from services.export.modelling_code import ExportError, modelling_code
from services.study.mechanism import mechanism_code

IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # how transformers finds the files to copy
POINT = DesignPoint(decay="mamba2")


def valid_configs():
    """One small model for each decay, encoding and transition that go together: these decide which files are exported."""
    for decay in decays.names():
        p = 0.9 if decays.get(decay).takes_p else None
        for position in positions.names():
            for transition in transitions.names():
                axes = [(granularity, form) for granularity in GRANULARITIES for form in FORMS]
                points = [
                    DesignPoint(decay=decay, p=p, granularity=granularity, position=position, transition=transition, form=form)
                    for granularity, form in axes
                ]
                yield from [config for config in map(config_of, points) if is_valid(config)][:1]


def is_valid(config):
    try:
        config.check()
    except Refusal:
        return False
    return True


CONFIGS = list(valid_configs())


def few(configs):
    """As many as it takes to have each decay, and each encoding with each transition."""
    seen = set()
    for config in configs:
        brings = {config.point.decay, (config.point.position, config.point.transition)}
        if brings - seen:
            yield config
        seen |= brings


def test_the_code_of_every_variant_computes_its_logits_without_this_project(tmp_path):
    configs, cases, expected = list(few(CONFIGS)), [], []
    assert {config.point.decay for config in configs} == set(decays.names())
    for index, config in enumerate(configs):
        package, model = tmp_path / f"point_{index}", shaken(config)
        package.mkdir()
        for name, text in modelling_code(config.point).items():
            (package / name).write_text(text)
        tokens = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(index))
        cases.append((package.name, config.to_dict(), model.state_dict(), tokens))
        with torch.no_grad():
            expected.append(model(tokens))
    torch.save(cases, tmp_path / "cases.pt")
    alone("compute_flat.py", tmp_path, home=tmp_path)
    for config, ours, theirs in zip(configs, expected, torch.load(tmp_path / "logits.pt"), strict=True):
        assert ours.std() > 0.1 and torch.equal(ours, theirs), config.point.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.point.name)
def test_every_file_that_is_imported_is_there_and_no_other(config):
    files = modelling_code(config.point)
    wanted = {f"{name}.py" for text in files.values() for name in IMPORT.findall(text)}
    assert wanted | {"modeling_decay.py"} == set(files)


@pytest.mark.parametrize("config", list(few(CONFIGS)), ids=lambda config: config.point.name)
def test_all_that_the_forward_pass_is_made_of_is_exported(config):
    files = modelling_code(config.point)
    missing = {name.replace("/", "_") for name in mechanism_code(config.point)} - set(files)
    if config.point.transition == "softmax":  # it has no scan
        assert all(name.startswith(("kernels_", "decay_core_kernel_seam")) for name in missing)
    else:
        assert not missing


class WithoutImports(ast.NodeTransformer):
    """Imports inside functions too: a kernel is imported where it is chosen."""

    def visit_ImportFrom(self, node):
        return ast.Pass()


def test_only_lines_that_import_differ_from_the_source(root):
    files = modelling_code(POINT)
    for name, text in files.items():
        if name in ("chosen_variants.py", "decay_core_kernel_seam.py"):
            continue
        header = text.split('"""')[0]
        path = root / (header.split(" from ")[1].split(" of ")[0])
        source = path.read_text()
        assert hashlib.sha256(source.encode()).hexdigest() in header
        ours, theirs = (
            [node for node in WithoutImports().visit(ast.parse(code)).body if not isinstance(node, ast.If)]
            for code in (source, text)
        )
        assert [ast.dump(node) for node in ours] == [ast.dump(node) for node in theirs], name


def test_the_seam_takes_its_kernels_from_a_file_beside_it():
    seam = modelling_code(POINT)["decay_core_kernel_seam.py"]
    assert re.search(r"^from \.kernels_select_kernel import .*\bselect_decay_scan\b", seam, re.MULTILINE)
    assert "_FOLDER" not in seam and "import_module(" not in seam


def test_the_generated_file_knows_the_variants_of_the_point_alone():
    text = modelling_code(DesignPoint(decay="gla", granularity="scalar", position="rope"))["chosen_variants.py"]
    assert re.findall(r'return \{"(\w+)": (\w+)\}', text) == [
        ("gla", "GatedLinearAttention"), ("rope", "Rope"), ("diagonal", "Diagonal")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "source, words",
    [
        ("import decay_core.layers\n", "write `from ... import ...`"),
        ("from decay_core import layers\n", "import names out of that module instead"),
        ("from decay_core.decays import get\n", "import the package from decay_core"),
    ],
)
def test_an_import_that_no_export_could_have_is_refused(monkeypatch, source, words):
    monkeypatch.setattr(module, "_source", lambda name: source)
    with pytest.raises(ExportError, match=re.escape(words)):
        modelling_code(POINT)


def test_a_seam_that_reaches_its_kernels_otherwise_is_refused(monkeypatch):
    whole = module._source
    monkeypatch.setattr(module, "_source", lambda name: whole(name).replace("_SELECTOR", "_CHOOSER"))
    with pytest.raises(ExportError, match="teach services/export that way"):
        modelling_code(POINT)


def test_a_decay_from_another_folder_is_exported(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text((module.ROOT / "decay_core" / "decays" / "sigmoid.py").read_text())
    monkeypatch.setattr(decays, "__path__", [*decays.__path__, str(tmp_path)])
    decays._registry.cache_clear()
    try:
        assert "class Sigmoid" in modelling_code(DesignPoint(decay="toy"))["decay_core_decays_toy.py"]
    finally:
        decays._registry.cache_clear()
        sys.modules.pop("decay_core.decays.toy", None)
