"""The benchmark of the kernels, as far as it needs no GPU: floors, records, ratios, claims, tables, tuning, arguments."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernel_claims import claims
from benchmarks.kernel_contestants import CONTESTANTS, DECAYS, NotHere, inputs
from benchmarks.kernel_delta_contestants import _dplr, _general, delta_problem
from benchmarks.kernel_results import Results, failures, write
from benchmarks.kernel_run import ROOT, gpu_name
from benchmarks.kernel_shapes import (
    CLASSES,
    DELTA_CLASSES,
    DELTA_SHAPES,
    SHAPES,
    VECTOR_CLASSES,
    Roofline,
    Shape,
    WrongArgument,
    compulsory_bytes,
    error_shape,
    floor_ms,
    short_shape,
)
from benchmarks.kernel_table import HEADINGS, render
from benchmarks.kernel_tuning import DeviceFault, Tuning, is_fault, nearest

H100 = Roofline(terabytes_per_s=3.0, teraflops_per_s=790.0)
FIRST = SHAPES[0]


@pytest.mark.parametrize(
    ("kind", "heads", "forward", "both"),
    [("scalar", 12, 0.135, 0.372), ("scalar", 16, 0.180, 0.496), ("scalar", 32, 0.361, 0.993), ("vector", 16, 0.224, 0.626)],
)
def test_floors_are_those_the_kernels_were_designed_against(kind, heads, forward, both):
    shape = Shape.of((32, 2048, heads, 64))
    assert floor_ms(shape, kind, H100) == pytest.approx((forward, both), abs=1e-3)


def test_bytes_are_inputs_and_outputs_once_with_key_and_value_dims_apart():
    shape = Shape.of((1, 1, 1, 128, 64))
    assert compulsory_bytes(shape, "scalar") == (2 * (2 * 128 + 64) + 4 + 2 * 64, 2 * (2 * (2 * 128 + 64) + 4) + 2 * 64)
    assert compulsory_bytes(shape, "vector")[0] - compulsory_bytes(shape, "scalar")[0] == 2 * 128 - 4
    assert compulsory_bytes(shape, "vector", element_bytes=4)[0] == 4 * (3 * 128 + 2 * 64)


def test_softmax_attention_is_bound_by_products_where_the_scans_are_bound_by_memory():
    forward, _ = floor_ms(Shape.of((1, 65536, 16, 64)), "softmax", H100)
    assert forward == pytest.approx(16 * 65536**2 / 2 * 2 * 128 / 790e12 * 1e3)


def test_an_unknown_gpu_has_the_roofline_that_was_measured():
    assert Roofline.of("NVIDIA H100 80GB HBM3", 2.9, 700.0) == H100
    assert Roofline.of("NVIDIA A100-SXM4-40GB", 1.3, 250.0) == Roofline(terabytes_per_s=1.3, teraflops_per_s=250.0)


def test_a_shape_is_four_numbers_or_five():
    assert Shape.parse("32,2048,16,64") == FIRST and FIRST.numbers == [32, 2048, 16, 64]
    several = kernels.settings(kernels.parse(["--shapes", "32,2048,16,64; 32,2048,12,64"])).shapes
    assert several == SHAPES[:2]
    assert Shape.parse("32,2048,16,128,64").numbers == [32, 2048, 16, 128, 64] == SHAPES[3].numbers
    for wrong in ("32,2048,16", "32,2048,16,0", "32x2048x16x64", "", "1,2,3,4,5,6"):
        with pytest.raises(WrongArgument, match="B,T,H,D"):
            Shape.parse(wrong)


def test_errors_and_compilation_use_small_shapes_of_the_same_dims():
    for shape in SHAPES:
        assert error_shape(shape).numbers[:3] == [1, 256, 16] and error_shape(shape).dims == shape.dims
        small = short_shape(shape)
        assert (small.batch, small.heads, small.dims) == (shape.batch, shape.heads, shape.dims)
        assert 128 <= small.tokens <= shape.tokens and small.batch * small.heads * small.tokens <= 2**17


# What workers say of a run.
ERRORS = {"o": 2e-3, "dq": 2e-3, "dk": 3e-3, "dv": 2e-3, "dg": 1e-3}


def about(**changed):
    given = {"date": "2026-01-01", "classes": ["scalar", "vector"], "dtype": "bf16", "decay": "mild", "bandwidth_tb_s": None}
    return {**given, **changed}


def row(kind, name, shape=FIRST, fwd=(0.2,), both=(0.8,), **more):
    timed = {"fwd_repeats": list(fwd), "fwd_bwd_repeats": list(both), "peak_mib": 900.0}
    given = {"record": "row", "class": kind, "contestant": name, "shape": shape.numbers, "ours": name.startswith("ours")}
    return {**given, **(timed if "skipped" not in more else {}), **more}


def errors(kind, name, shape=FIRST, **changed):
    about = {"class": kind, "contestant": name, "dims": list(shape.dims)}
    return {"record": "errors", **about, "errors": {**ERRORS, **changed}}


def results(*records):
    found = Results(about())
    for record in ({"record": "facts", "gpu": "NVIDIA H100 80GB HBM3", "copy_tb_s": 2.9, "matmul_tflop_s": 700.0}, *records):
        found.add({"class": "scalar", "contestant": "ours", **record})
    return found


def test_a_contestant_timed_in_two_processes_is_one_row_with_the_median_of_all():
    found = results(row("scalar", "ours", both=(0.80, 0.90)), row("scalar", "ours", both=(0.86, 0.84))).document()
    (only,) = found["rows"]
    assert only["fwd_bwd_ms"] == 0.85 and only["fwd_bwd_spread"] == pytest.approx(0.1 / 0.85, rel=1e-3)
    assert only["fwd_bwd_of_floor"] == pytest.approx(0.496 / 0.85, rel=1e-2)


def test_times_on_the_gpu_alone_stand_beside_those_that_a_caller_sees():
    def timed(name, both, *alone):
        return row("scalar", name, both=(both,), fwd_gpu_repeats=[0.1] * len(alone), fwd_bwd_gpu_repeats=list(alone))

    found = results(
        timed("ours", 0.8, 0.5), timed("ours", 0.8, 0.7), timed("chunk_simple_gla", 2.0, 1.5), timed("ours_fused", 1.0)
    )
    document = found.document()
    ours, peer, fused = document["rows"]
    assert (ours["fwd_bwd_gpu_ms"], peer["fwd_bwd_gpu_ms"], fused["fwd_bwd_gpu_ms"]) == (0.6, 1.5, None)
    lines = [line.split(" | ") for line in render(document).splitlines() if line.startswith("| ")]
    column = lines[0].index("GPU alone, fwd+bwd ms")
    assert [line[column - 1 : column + 2] for line in lines[2:5]] == [["–", "0.6", "–"], ["2.5", "1.5", "2.5"], ["–", "–", "–"]]


def test_a_ratio_is_the_rivals_time_over_ours_and_has_the_agreed_keys():
    found = results(
        row("scalar", "ours", both=(0.8,)),
        row("scalar", "chunk_simple_gla", both=(2.0,)),
        row("softmax", "sdpa_flash", both=(1.6,)),
        row("scalar", "ours_fused", both=(0.7,)),
        row("vector", "chunk_gla", both=(6.0,)),  # without ours there is no ratio
        row("scalar", "chunk_simple_gla", SHAPES[1], both=(1.0,)),
        errors("scalar", "ours"),
        errors("scalar", "chunk_simple_gla", dk=0.4),
    ).document()
    assert [(r["class"], r["peer"], r["ratio"]) for r in found["ratios"]] == [
        ("scalar", "chunk_simple_gla", 2.5),
        ("scalar", "sdpa_flash", 2.0),
    ]
    first = found["ratios"][0]
    assert list(first) == ["class", "peer", "shape", "ours_ms", "peer_ms", "ratio", "error_ours", "error_peer"]
    assert first["shape"] == [32, 2048, 16, 64] and (first["error_ours"], first["error_peer"]) == (3e-3, 0.4)


def test_the_file_is_strict_json_and_replaced_in_one_step(tmp_path):
    found = results(row("scalar", "ours"), errors("scalar", "ours", dq=math.nan), row("scalar", "chunk_simple_gla"))
    path = tmp_path / "results" / "kernels-h100.json"
    write(path, {"schema": 0})
    write(path, found.document())
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["rows"][0]["errors"]["dq"] is None and read["rows"][0]["wrong"] is True
    assert [file.name for file in path.parent.iterdir()] == ["kernels-h100.json"]
    assert {"schema", "date", "host", "roofline", "rows", "ratios", "first_call", "tuning", "notes"} <= read.keys()
    assert render(read) == render(found.document()), "what is rendered from the file is what the run printed"


def test_what_is_wrong_or_crashed_of_ours_fails_the_run_and_of_others_does_not():
    good = results(
        row("scalar", "ours", same_bits=True),
        row("scalar", "chunk_simple_gla", failed="illegal"),
        row("vector", "ours", skipped="time budget"),
        errors("scalar", "ours"),
        errors("scalar", "chunk_simple_gla", dk=1.0),
    )
    assert failures(good.document()) == []
    for record in (
        errors("vector", "ours", dg=0.3),
        row("vector", "ours", failed="died"),
        row("vector", "ours", same_bits=False),
    ):
        bad = results(row("vector", "ours"), record).document()
        assert len(failures(bad)) == 1 and failures(bad)[0].startswith("vector, ours, (32, 2048, 16, 64): ")


def test_a_shape_that_was_skipped_once_and_timed_once_is_timed():
    skipped = row("scalar", "ours", skipped="time budget")
    for records in ((skipped, row("scalar", "ours")), (row("scalar", "ours"), skipped)):
        (only,) = results(*records).document()["rows"]
        assert only["fwd_bwd_ms"] == 0.8 and "skipped" not in only


def test_tuning_is_summed_over_the_processes_that_shared_it():
    shares = [{"record": "tuning", "contestant": "chunk_gla", "compile_s": 30.0, "configs": 20}] * 3
    timed = {"record": "tuning", "contestant": "chunk_gla", "tune_s": 8.0, "chosen": {"k": "{}"}}
    found = results(*shares, timed, row("vector", "chunk_gla")).document()
    assert found["rows"][0]["first_call_s"] == 98.0 and found["tuning"]["chunk_gla"]["configs"] == 60


def test_every_claim_of_the_task_is_asked():
    asked = {claim["claim"]: claim["threshold"] for claim in claims(results().document())}
    for shape, scalar, vector in zip(SHAPES, (2.5, 2.3, 1.8, 1.8, 1.8, 1.8), (4, 3.5, 3.5, 2.5, 2.5, 2.5), strict=True):
        assert asked[f"scalar {shape}: times as fast as chunk_simple_gla"] == f"≥ {scalar}"
        assert asked[f"vector {shape}: times as fast as chunk_gla"] == f"≥ {vector:g}"
    assert asked[f"scalar {FIRST}: times as fast as fused_chunk_simple_gla"] == "≥ 1.3"
    assert asked[f"scalar {FIRST}: times the roofline floor"] == "≤ 1.7"
    assert asked[f"vector {FIRST}: times the roofline floor"] == "≤ 2.2"
    assert all(claim["met"] is None for claim in claims(results().document()))


def test_claims_are_met_or_not_by_what_was_measured():
    found = results(
        row("scalar", "ours", both=(0.8,), same_bits=True),
        row("scalar", "chunk_simple_gla", both=(1.9,), peak_mib=1000.0),
        row("scalar", "fused_chunk_simple_gla", both=(1.2,), peak_mib=600.0),
        errors("scalar", "ours", dv=7e-3),
        errors("scalar", "chunk_simple_gla", dv=7e-3),
        {"record": "first_call", "seconds": 12.0, "parts": {}, "kernels": 6},
    ).document()
    met = {claim["claim"]: claim["met"] for claim in claims(found)}
    assert met[f"scalar {FIRST}: times as fast as chunk_simple_gla"] is False
    assert met[f"scalar {FIRST}: times as fast as fused_chunk_simple_gla"] is True
    assert met[f"scalar {FIRST}: times the roofline floor"] is True
    assert met["scalar, ours: error of o, dq, dk, dv"] is False
    assert met["scalar, ours: error of the decay's gradients"] is True
    assert met["scalar: largest error over that of chunk_simple_gla"] is True
    assert met["scalar: peak memory over that of chunk_simple_gla, at worst"] is True
    assert met["scalar: peak memory over that of fused_chunk_simple_gla, at worst"] is False
    assert met["scalar, ours: seconds of the first call of a model's kernels, cold"] is True
    assert met[f"vector {FIRST}: times as fast as chunk_gla"] is None


def test_the_errors_of_a_fused_decay_count_as_the_decays():
    given = {"o": 1e-3, "dq": 1e-3, "dk": 1e-3, "dv": 1e-3, "df": 2e-3, "dgain": 2e-2, "doffset": 1e-3}
    record = {**errors("scalar", "ours_fused"), "errors": given}
    met = {claim["claim"]: claim["met"] for claim in claims(results(row("scalar", "ours_fused"), record).document())}
    assert met["scalar, ours_fused: error of the decay's gradients"] is False


def test_tables_have_a_cell_under_every_heading_whatever_failed():
    page = render(
        results(
            row("scalar", "ours", SHAPES[3]),
            row("scalar", "chunk_simple_gla", SHAPES[3], remark="a | b\nc"),
            row("softmax", "sdpa_flash", SHAPES[3], skipped="flash attention needs K = V"),
            errors("scalar", "ours", SHAPES[3]),
            errors("scalar", "chunk_simple_gla", SHAPES[3], dk=math.inf),
            {"record": "note", "text": "said once"},
            {"record": "note", "text": "said once"},
        ).document()
    )
    tables = [part for part in page.split("\n\n") if part.startswith("| contestant")]
    assert len(tables) == 1 and "(32, 2048, 16, K 128, V 64)" in page
    for line in tables[0].splitlines():
        assert line.replace("\\|", "").count("|") == len(HEADINGS) + 1
    assert "WRONG; a \\| b c" in page and "not finite" in page and "flash attention needs K = V" in page
    assert page.count("said once") == 1


def test_files_are_named_by_the_gpu():
    assert gpu_name("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_name("NVIDIA H200") == "h200"
    assert gpu_name("NVIDIA A100-SXM4-40GB") == "a100"
    assert gpu_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_only_the_default_measurement_has_the_plain_name():
    named = [kernels.settings(kernels.parse(words)).named("h100") for words in ([], ["--decay", "steep"], ["--quick"])]
    assert named == ["kernels-h100", "kernels-h100-steep", "kernels-h100-quick"]


# Who takes part.


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("name", "kind"), [*(("ours", kind) for kind in CLASSES), ("sdpa_flash", "scalar")])
def test_a_contestants_gradients_are_those_of_its_own_definition(name, kind, decay):
    shape = Shape.of((1, 33, 2, 8, 8 if name == "sdpa_flash" else 16))
    given = inputs(shape, kind in VECTOR_CLASSES, torch.float32, "cpu", decay, kind=kind)
    problem = CONTESTANTS[name].problem(given)
    assert ("beta" in problem.leaves) == (kind in DELTA_CLASSES and kind != "delta_general")
    wide = {key: leaf.detach().double().requires_grad_() for key, leaf in problem.leaves.items()}
    o = problem.reference(wide)
    right = (o, *torch.autograd.grad(o, list(wide.values()), problem.do.double()))
    for got, wanted in zip(problem.gradients(), right, strict=True):
        assert got.shape == wanted.shape and (got - wanted).norm() <= 2e-5 * wanted.norm()


def test_the_delta_rule_written_with_a_and_b_is_the_delta_rule():
    given = inputs(Shape.of((2, 9, 3, 4, 5)), True, torch.float64, "cpu", kind="delta_vector")
    x = _general(given)
    wanted = delta_problem(given).reference({**x, "beta": given.beta})
    assert (_dplr(x, 1.0) - wanted).norm() <= 1e-6 * wanted.norm()  # a and b are made in fp32
    other = _general(inputs(Shape.of((2, 9, 3, 4, 5)), True, torch.float64, "cpu", kind="delta_general"))
    assert (_dplr(other, 1.0) - wanted).norm() > 0.1 * wanted.norm()


def test_the_delta_rule_has_shapes_of_its_own_and_is_asked_for():
    assert kernels.settings(kernels.parse([])).classes == ("scalar", "vector")
    assert kernels.settings(kernels.parse(["--classes", "delta_scalar"])).shapes == DELTA_SHAPES
    assert kernels.settings(kernels.parse(["--classes", "delta_scalar,scalar"])).shapes == SHAPES


def test_decays_are_in_the_range_of_trained_models():
    shape = Shape.of((2, 512, 4, 16))
    for vector in (False, True):
        mild, steep = (inputs(shape, vector, torch.bfloat16, "cpu", decay).log_decay.float() for decay in ("mild", "steep"))
        assert 0.8 < mild.exp().median() < 0.99 and mild.max() <= 0
        assert steep.exp().median() == pytest.approx(0.2, abs=0.03)


def test_a_rivals_inputs_are_the_same_numbers():
    shape = Shape.of((1, 16, 2, 8))
    one, other = (inputs(shape, True, torch.bfloat16, "cpu") for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("q", "k", "v", "do", "f", "log_decay"))
    assert (
        one.log_decay.dtype == torch.bfloat16 and inputs(shape, False, torch.bfloat16, "cpu").log_decay.dtype == torch.float32
    )


def test_softmax_attention_says_what_it_cannot_do():
    with pytest.raises(NotHere, match="K = V"):
        CONTESTANTS["sdpa_flash"].problem(inputs(SHAPES[3].of((1, 4, 1, 16, 8)), False, torch.float32, "cpu"))


def test_ours_is_timed_before_and_after_its_rivals():
    settings = kernels.settings(kernels.parse(["--peers", "all"]))
    order = [(spec["class"], spec["contestant"]) for spec in kernels.timing_order(settings)]
    for kind, rivals in (("scalar", ("chunk_simple_gla", "fused_chunk_simple_gla")), ("vector", ("chunk_gla",))):
        first, last = (i for i, spec in enumerate(order) if spec == (kind, "ours"))
        assert all(first < order.index((kind, rival)) < last for rival in rivals)
    assert set(order) == {(k, c.name) for c in CONTESTANTS.values() for k in c.classes if k not in DELTA_CLASSES}
    assert len(order) == len(set(order)) + 2


# Tuning.


def autotuner(configs, fails=None, prune=None):
    """Triton's own autotuner around a kernel that writes down how it was called."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")

    def kernel(x, SIZE, FLAG):
        """Stands for a kernel."""

    calls = []

    def run(*args, warmup=False, **kwargs):
        calls.append(kwargs)
        if fails is not None and (error := fails(kwargs)) is not None:
            raise error
        return SimpleNamespace(_init_handles=lambda: None)

    assert inspect.isfunction(kernel)
    jit = SimpleNamespace(fn=kernel, run=run)
    made = [autotuner.Config({"BLOCK": block}, num_warps=warps, num_stages=2) for block, warps in configs]
    prune_by = None if prune is None else {"early_config_prune": prune}
    tuner = autotuner.Autotuner(jit, ["x", "SIZE", "FLAG"], made, ["SIZE", "FLAG"], None, None, prune_configs_by=prune_by)
    return tuner, calls


CONFIGS = [(block, warps) for block in (32, 64, 128) for warps in (1, 2, 4, 8)]


def tuning(mode, path, calls, **more):
    """Times are the block's distance from 64 and the warps' from 2, in doublings."""

    def bench(call):
        call()
        return abs(math.log2(calls[-1]["BLOCK"] / 64)) + abs(math.log2(calls[-1]["num_warps"] / 2))

    remarks = []
    return Tuning(mode=mode, file=path, bench=bench, remark=remarks.append, **more), remarks


def call(tuner, size=64, flag=True):
    return tuner.run(torch.empty(1), SIZE=size, FLAG=flag, warmup=False)


def described(kwargs):
    return kwargs["BLOCK"], kwargs["num_warps"]


def test_processes_compile_every_candidate_once_between_them(tmp_path):
    seen = []
    for share in range(5):
        tuner, calls = autotuner(CONFIGS)
        mine, _ = tuning("compile", tmp_path / "pins.json", calls, share=(share, 5))
        mine.turn_to(tmp_path / "pins.json")
        with mine.installed():
            assert call(tuner) is None and call(tuner) is None, "a second call compiles nothing"
        seen += map(described, calls)
        assert mine.configs == len(calls) in (2, 3)
    assert sorted(seen) == sorted(CONFIGS)


def test_the_best_candidate_is_kept_and_used_at_other_sizes_without_timing(tmp_path):
    tuner, calls = autotuner(CONFIGS)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner)
    assert len(calls) == len(CONFIGS) + 1 and described(calls[-1]) == (64, 2)
    tuner, calls = autotuner(CONFIGS)
    mine, remarks = tuning("pinned", tmp_path / "pins.json", calls, few=4)
    with mine.installed():
        call(tuner, size=128)
    call(tuner, size=128)  # Triton's own path has it in its cache
    assert list(map(described, calls)) == [(64, 2), (64, 2)] and not remarks


def test_flags_and_dtypes_are_tuned_apart(tmp_path):
    tuner, calls = autotuner(CONFIGS)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner, flag=True)
        call(tuner, flag=False)
        call(tuner, size=128, flag=False)
    assert len(mine.pins) == 2 and len(calls) == 2 * len(CONFIGS) + 3


def test_where_the_kernels_own_rules_forbid_what_was_kept_a_few_near_it_are_timed(tmp_path):
    tuner, calls = autotuner(CONFIGS)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner)
    tuner, calls = autotuner(CONFIGS, prune=lambda configs, *_, **__: [c for c in configs if c.kwargs["BLOCK"] > 64])
    mine, remarks = tuning("pinned", tmp_path / "pins.json", calls, few=3)
    with mine.installed():
        call(tuner, size=256)
    assert set(map(described, calls[:-1])) == {(128, 1), (128, 2), (128, 4)} and described(calls[-1]) == (128, 2)
    assert len(remarks) == 1 and "3 candidates" in remarks[0]


def test_where_what_was_kept_does_not_run_others_are_timed(tmp_path):
    tuner, calls = autotuner(CONFIGS)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner)
    tuner, calls = autotuner(CONFIGS, fails=lambda kwargs: MemoryError("shared memory") if kwargs["BLOCK"] > 32 else None)
    mine, remarks = tuning("pinned", tmp_path / "pins.json", calls, few=4)
    with mine.installed():
        call(tuner, size=256)
    assert described(calls[-1]) == (32, 2) and "MemoryError" in remarks[0]


def test_a_kernel_that_was_never_tuned_is_tuned_over_a_few(tmp_path):
    tuner, calls = autotuner(CONFIGS)
    mine, remarks = tuning("pinned", tmp_path / "pins.json", calls, few=4)
    with mine.installed():
        call(tuner)
    assert len(calls) == 5 and "was not tuned" in remarks[0] and not (tmp_path / "pins.json").exists()


def test_a_candidate_at_which_the_gpu_faults_ends_the_process_and_is_left_out_by_the_next(tmp_path):
    def fails(kwargs):
        return RuntimeError("Triton Error [CUDA]: an illegal memory access") if described(kwargs) == (64, 2) else None

    tuner, calls = autotuner(CONFIGS, fails=fails)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed(), pytest.raises(DeviceFault, match="illegal"):
        call(tuner)
    tuner, calls = autotuner(CONFIGS, fails=fails)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner)
    assert (64, 2) not in map(described, calls) and described(calls[-1]) in {(32, 2), (64, 1), (64, 4), (128, 2)}


def test_a_candidate_that_merely_fails_costs_nothing_else(tmp_path):
    tuner, calls = autotuner(CONFIGS, fails=lambda kwargs: ValueError("no such tile") if kwargs["num_warps"] < 4 else None)
    mine, _ = tuning("tune", tmp_path / "pins.json", calls)
    with mine.installed():
        call(tuner)
    assert described(calls[-1]) == (64, 4) and mine.failed == 6


def test_faults_are_told_from_other_errors():
    assert is_fault(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_fault(RuntimeError("Triton Error [CUDA]: misaligned address"))
    assert not is_fault(RuntimeError("CUDA out of memory"))
    assert not is_fault(ValueError("illegal argument"))


def test_a_few_candidates_are_spread_over_the_list():
    tuner, _ = autotuner(CONFIGS)
    assert len(nearest(tuner.configs, None, 4)) == 4 and nearest(tuner.configs[:2], None, 4) == tuner.configs[:2]
    assert nearest(tuner.configs, tuner.configs[5], 1) == [tuner.configs[5]]


# The command.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shapes", "1,2,3"], "B,T,H,D"),
        (["--classes", "scalar,delta"], "unknown delta"),
        (["--classes", ""], "--classes"),
        (["--peers", "chunk_gda"], "unknown chunk_gda; there are chunk_simple_gla"),
        (["--peers", "ours"], "unknown ours"),
        (["--dtype", "fp32"], "--dtype"),
        (["--budget-seconds", "0"], "positive"),
        (["--decay", "none"], "mild"),
        (["--faster"], "--faster"),
        (["--render", "gone.json"], "gone.json cannot be read"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(words, said, capsys):
    assert kernels.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("kernels: ") and said in err


def test_a_file_is_rendered(tmp_path, capsys):
    path = tmp_path / "kernels-h100.json"
    write(path, results(row("scalar", "ours"), row("scalar", "chunk_simple_gla", both=(2.0,))).document())
    assert kernels.main(["--render", str(path)]) == 0
    assert "| chunk_simple_gla | 0.2 | 2 | 0.0 % | 2.5 |" in capsys.readouterr().out


def benchmark(env, *words):
    command = [sys.executable, "benchmarks/kernels.py", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_without_a_gpu_one_line_says_so(process_env):
    said = benchmark(process_env)
    assert said.returncode == 2 and said.stderr.count("\n") == 1 and "no GPU" in said.stderr


@pytest.mark.slow
def test_all_phases_run_on_a_cpu(process_env, tmp_path):
    path = tmp_path / "kernels.json"
    words = ["--device", "cpu", "--classes", "scalar", "--peers", "sdpa_flash,chunk_simple_gla", "--shapes", "1,32,1,16"]
    said = benchmark({**process_env, "PYTHONWARNINGS": "ignore"}, *words, "--out", str(path), "--jobs", "2")
    assert said.returncode == 0, said.stdout + said.stderr
    document = json.loads(path.read_text())
    (ratio,) = (ratio for ratio in document["ratios"] if ratio["peer"] == "sdpa_flash")
    assert ratio["class"] == "scalar" and ratio["shape"] == [1, 32, 1, 16]
    assert ratio["ratio"] == pytest.approx(ratio["peer_ms"] / ratio["ours_ms"], rel=1e-3)
    ours = next(row for row in document["rows"] if row["contestant"] == "ours")
    assert len(ours["fwd_bwd_repeats"]) == 4 and max(ours["errors"].values()) < 1e-2 and ours["same_bits"]
    assert render(document) == path.with_suffix(".md").read_text() and render(document) in said.stdout
    assert sorted(os.listdir(tmp_path)) == ["kernels.json", "kernels.md"]
