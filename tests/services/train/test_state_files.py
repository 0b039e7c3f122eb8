"""Every file that a killed trial left is damaged in every way: the same bits, or a line that names what is lost (F3)."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow

NEWEST = "checkpoints/step_00000008"
FILES = (
    f"{NEWEST}/COMPLETE.json", f"{NEWEST}/deepspeed/mp_rank_00_model_states.pt", f"{NEWEST}/random_rank0.pt",
    f"{NEWEST}/steps.jsonl", f"{NEWEST}/histograms/step_00000001.parquet",
    "steps.jsonl", "histograms/step_00000001.parquet", "histograms/step_00000005.parquet",
    "fence.json",
)  # fmt: skip
HOW = ("removed", "emptied", "truncated", "flipped")


def damage(path, how):
    """Does to a file what a bad disk or hand does; a flip changes one bit in its middle."""
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    data[len(data) // 2] ^= 4
    path.write_bytes(b"" if how == "emptied" else bytes(data[: len(data) // 2]) if how == "truncated" else bytes(data))


def sweep(train, cases):
    (killed,) = train({"name": "killed"}, kill_at=10)
    quiet, *_ = train({"name": "quiet"})
    jobs = {}
    for file, how in cases:
        name = f"{how}-{file.replace('/', '-')}"
        whole = killed.folder.parents[1]
        shutil.copytree(whole, whole.with_name(name))
        damage(whole.with_name(name) / "trials" / "trial" / file, how)
        jobs[name] = (file, how)
    for (file, _), outcome in zip(jobs.values(), train(*({"name": name} for name in jobs)), strict=True):
        assert outcome.result["weights_sha256"] == quiet.result["weights_sha256"], file
        assert outcome.losses == quiet.losses, file
        assert (outcome.folder / "histograms.parquet").read_bytes() == (quiet.folder / "histograms.parquet").read_bytes(), file
        events = [json.loads(path.read_bytes()) for path in sorted((outcome.folder.parents[1] / "ledger").iterdir())]
        begun = [event["details"]["from_step"] for event in events if event["kind"] == "attempt"]
        assert begun == [0, 4 if file.startswith(NEWEST) else 8], f"{file}: an attempt began at a step that it should not have"


def test_each_file_damaged_in_one_way_is_made_good_or_named(train):
    sweep(train, [(file, HOW[number % len(HOW)]) for number, file in enumerate(FILES)])


@pytest.mark.faults
@pytest.mark.parametrize("how", HOW)
def test_each_file_damaged_in_each_way_is_made_good_or_named(train, how):
    sweep(train, [(file, how) for file in FILES])
