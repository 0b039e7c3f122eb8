"""The table of measured configurations is read back as it was written, and a damaged one is refused in one line."""

import dataclasses
import json

import pytest

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import tuned
from kernels.tuned import Row, made, rows, tuned_config, write_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    chunk: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    policy: str
    forward: Launch
    dq: Launch | None = None


ROW = Row(
    architecture="sm_90", granularity="scalar", key_dim=64, value_dim=128, milliseconds=0.8, shape=[32, 2048, 16, 64, 128],
    config={"policy": "save", "forward": {"chunk": 64, "registers": 128}}, gpu="a GPU", versions="torch 2", date="2026-01-31",
)  # fmt: skip


def table(*changes):
    return json.dumps({"rows": [dataclasses.asdict(ROW) | changed for changed in changes]})


def test_what_was_measured_is_found_again_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    assert tuned_config("sm_90", "scalar", 64, 128, Config) is None  # there is no table
    write_rows(tuned.TABLE, [ROW])
    found = tuned_config("sm_90", "scalar", 64, 128, Config)
    assert found == Config(policy="save", forward=Launch(chunk=64, registers=128))
    for other in (("sm_80", "scalar", 64, 128), ("sm_90", "vector", 64, 128), ("sm_90", "scalar", 128, 64)):
        assert tuned_config(*other, Config) is None


def test_new_rows_replace_those_of_their_key_and_keep_the_others(tmp_path):
    path = tmp_path / "tuned.json"
    other = dataclasses.replace(ROW, key_dim=128)
    write_rows(path, [ROW, other])
    faster = dataclasses.replace(ROW, milliseconds=0.7)
    write_rows(path, [faster])
    assert rows(path) == {ROW.key: faster, other.key: other}


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no table of configurations"),
        ("[]", "is no table of configurations"),
        ('{"rows": [3]}', "row 0 is 3, not a set of fields"),
        (json.dumps({"rows": [{"gpu": "a"}]}), "missing"),
        (table({"speed": 1}), "row 0 has the unknown field 'speed', it has architecture"),
        (table({"key_dim": "64"}), "row 0: key_dim is '64', not int"),
        (table({"granularity": "paired"}), "granularity is 'paired', not 'scalar' or 'vector' or"),
        (table({}, {}), "row 1 repeats sm_90 scalar 64 128; keep one"),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(text, said, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError) as refusal:
        rows(path)
    assert said in str(refusal.value) and "tuned.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [{"policy": True, "forward": {"chunk": 64}}, {"policy": "save", "forward": {"chunk": True}}])
def test_a_configuration_of_other_types_is_refused(config):
    with pytest.raises(ValueError, match="is True, not"):
        made(Config, config, "a row")


def test_every_row_of_our_table_fits_its_launcher():
    pytest.importorskip("triton", reason="Triton is for Linux")
    from kernels import decay_scan_triton, delta_scan_triton, dplr_scan_triton

    for row in rows(tuned.TABLE).values():
        operators = delta_scan_triton if row.granularity.startswith("delta") else decay_scan_triton
        operators = dplr_scan_triton if row.granularity == dplr_scan_triton.GRANULARITY else operators
        made(operators.config_class(row.granularity), row.config, str(row.key))
