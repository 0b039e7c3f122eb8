"""Every file of a finished study is damaged in every way: the next run ends with the same study, or names the file (F3)."""

import shutil

import pytest
from harness import differences, end_state, report

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2400)]

HOW = ("removed", "emptied", "truncated", "flipped")
FILES = ("study.json", "fence.json", "ledger/*", "trials/*/result.json", "trials/*/fence.json", "trials/*/steps.jsonl",
         "report/table.csv", "../mlflow.db", "../data/*/manifest.json", "../data/*/*.arrow")  # fmt: skip
ONE = {"resources": {"workers": 1, "zero_stage": 0}}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    data[len(data) // 2] ^= 4
    path.write_bytes(b"" if how == "emptied" else bytes(data[: len(data) // 2]) if how == "truncated" else bytes(data))


@pytest.mark.parametrize("how", HOW)
def test_each_file_of_a_finished_study_is_made_good_or_named(place, how):
    study = place(**ONE)
    assert study.run().code == 0, study.log()
    expected, runs = end_state(study), study.folder / "runs"
    whole = study.folder / "whole"
    shutil.copytree(runs, whole)
    verdicts = {}
    for pattern in FILES:
        victim = sorted(study.root.glob(pattern))[-1]
        damage(victim, how)
        (study.folder / "run.log").unlink()
        ended = study.run()
        lines = [line for line in ended.log.splitlines() if line.startswith("decay: ")]
        name = victim.name if victim.name != "mlflow.db" else "tracking.uri"
        named = ended.code == 2 and len(lines) == 1 and name in lines[0] and "Traceback" not in ended.log
        wrong = differences(expected, end_state(study)) if ended.code == 0 else ["not complete"]
        verdicts[pattern] = "named" if named else "same" if not wrong else f"{ended.code}: {wrong[:3]} {ended.log[-600:]}"
        shutil.rmtree(runs)
        shutil.copytree(whole, runs)
    bad = {pattern: said for pattern, said in verdicts.items() if said not in ("named", "same")}
    print(how, verdicts)
    report({"fault": "F3", "test": how, "asked": len(FILES), "fired": len(FILES), "passed": len(FILES) - len(bad),
            "silent": sum(said.startswith("0:") for said in bad.values()), "seconds": [], "repeated": []})  # fmt: skip
    assert not bad
