"""The token cache is a function of the text and the spec: not of workers, kills, paths or the disk's moods."""

import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.data import encoding, shards, sources, token_cache
from services.data.shards import CacheError, document_sum, is_held_out
from services.data.token_cache import DataSpec, TokenCache, open_cache, prepare

REPOSITORY = Path(__file__).parents[3]
KILLED = """
import itertools, multiprocessing, os, signal, sys
from pathlib import Path
from services.data import shards, sources, token_cache

def killed_while_reading():
    whole = sources._rows
    def rows(*arguments):
        for number, text in enumerate(whole(*arguments)):
            if len(list(cache.glob("*/0*.json"))) >= 3:
                print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            yield text
    sources._rows = rows

def killed_before_rename():
    whole, calls = os.replace, itertools.count()
    def replace(*arguments):
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*arguments)
    os.replace = replace

if __name__ == "__main__":
    point, workers, corpus, cache = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    shards.FIRST_BATCH_BYTES, shards.LARGEST_BATCH_BYTES = 1 << 11, 1 << 12
    globals()[point]()
    token_cache.prepare(token_cache.DataSpec(source=corpus, tokenizer="bpe-300", held_out_percent=10.0), cache,
                        workers=workers, progress=False)
"""


def spec_of(corpus: Path, **changes: Any) -> DataSpec:
    return DataSpec(**{"source": str(corpus), "tokenizer": "bpe-300", "held_out_percent": 10.0, **changes})


def make(corpus: Path, root: Path, workers: int = 1, **changes: Any) -> TokenCache:
    return prepare(spec_of(corpus, **changes), root, workers=workers, progress=False)


def all_tokens(stream: Any) -> list[int]:
    length = stream.n_tokens
    return stream.window(0, length).tolist() if length else []


def one_line(caught: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(caught.value)


@pytest.mark.parametrize("boundary", ["none", "eos"])
def test_tokens_are_the_documents_in_order_each_in_its_split(
        corpus: Path, texts: list[str], tmp_path: Path, small_batches: None, boundary: str) -> None:
    cache = make(corpus, tmp_path, boundary=boundary)
    tokenizer, tail = cache.tokenizer(), [299] if boundary == "eos" else []
    expected: dict[bool, list[int]] = {True: [], False: []}
    for text in texts:
        expected[is_held_out(document_sum(text), 10.0)] += tokenizer.encode(text).ids + tail
    assert len(cache.manifest["shards"]) > 10
    assert all_tokens(cache.train) == expected[False]
    assert all_tokens(cache.held_out) == expected[True]
    assert cache.vocab_size == 300 and (299 in expected[False]) == (boundary == "eos")


def test_manifest_counts_and_entropies_are_those_of_the_tokens(
        corpus: Path, texts: list[str], tmp_path: Path, small_batches: None) -> None:
    cache = make(corpus, tmp_path)
    manifest, train, held_out = cache.manifest, Counter(all_tokens(cache.train)), Counter(all_tokens(cache.held_out))
    out = [text for text in texts if is_held_out(document_sum(text), 10.0)]
    assert manifest["held_out"]["documents"] == len(out)
    assert manifest["held_out"]["text_bytes"] == sum(len(text.encode()) for text in out)
    assert manifest["train"] == {"documents": len(texts) - len(out), "tokens": train.total(),
                                 "text_bytes": sum(len(text.encode()) for text in texts if text not in out)}
    for key, counts in (("unigram_entropy_nats", held_out), ("train_unigram_entropy_nats", train)):
        entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
        assert manifest[key] == pytest.approx(entropy, rel=1e-12)  # order of summation
    add_one = {token: math.log((train[token] + 1) / (train.total() + 300)) for token in range(300)}
    cross = -sum(n * add_one[token] for token, n in held_out.items()) / held_out.total()
    assert manifest["unigram_cross_entropy_nats"] == pytest.approx(cross, rel=1e-12)


def test_trained_tokenizer_never_sees_held_out_text(tmp_path: Path, texts: list[str],
                                                    write_jsonl: Callable[..., Path]) -> None:
    kept = [text for text in texts if not is_held_out(document_sum(text), 10.0)]
    whole = make(write_jsonl(tmp_path / "whole", texts), tmp_path)
    without = make(write_jsonl(tmp_path / "without", kept), tmp_path)
    assert whole.manifest["tokenizer"]["sha256"] == without.manifest["tokenizer"]["sha256"]
    assert whole.held_out.n_tokens > 0 == without.held_out.n_tokens
    assert without.manifest["unigram_entropy_nats"] is None


def test_windows_cross_shards_and_drop_the_rest(corpus: Path, tmp_path: Path, small_batches: None) -> None:
    stream = make(corpus, tmp_path).train
    tokens = np.array(all_tokens(stream))
    for seq_len in (2, 97, 5000):
        n = stream.windows(seq_len)
        assert n == len(tokens) // seq_len
        rows = np.stack([stream.window(i, seq_len) for i in range(n)])
        assert rows.dtype == np.int64 and (rows.ravel() == tokens[:n * seq_len]).all()
    for i in (-1, stream.windows(97)):
        with pytest.raises(IndexError, match="does not exist"):
            stream.window(i, 97)
    with pytest.raises(ValueError, match="use at least 2"):
        stream.windows(1)


def test_pickled_cache_reads_the_same_and_carries_no_tokens(corpus: Path, tmp_path: Path) -> None:
    cache = make(corpus, tmp_path)
    before = len(pickle.dumps(cache))
    window = cache.train.window(3, 64)
    assert len(pickle.dumps(cache)) == before
    assert (pickle.loads(pickle.dumps(cache)).train.window(3, 64) == window).all()


def test_number_of_workers_does_not_change_the_digest(corpus: Path, tmp_path: Path, small_batches: None) -> None:
    one, three = make(corpus, tmp_path / "1"), make(corpus, tmp_path / "3", workers=3)
    assert len(one.manifest["shards"]) > 10
    assert one.manifest == three.manifest
    assert all_tokens(one.train) == all_tokens(three.train)


def test_digest_does_not_depend_on_the_path_but_on_every_choice(
        corpus: Path, texts: list[str], tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    other = write_jsonl(tmp_path / "elsewhere", texts, per_file=50)
    digest = make(corpus, tmp_path).digest
    assert make(other, tmp_path).digest == digest
    edited = write_jsonl(tmp_path / "edited", [*texts[:-1], texts[-1] + "."])
    changed = [make(edited, tmp_path).digest] + [make(corpus, tmp_path, **change).digest for change in (
        {"boundary": "eos"}, {"held_out_percent": 5.0}, {"tokenizer": "bpe-301"}, {"max_documents": 399})]
    assert len({digest, *changed}) == 6


def test_preparing_again_opens_what_is_there(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(corpus, tmp_path)
    monkeypatch.setattr(token_cache, "_build", None)
    again = make(corpus, tmp_path, held_out_percent=10)
    assert (again.path, again.manifest) == (cache.path, cache.manifest)
    assert cache.path.name.startswith("corpus-bpe-300-")


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
@pytest.mark.parametrize(("point", "workers"), [("killed_while_reading", 2), ("killed_before_rename", 1)])
def test_preparing_after_a_kill_ends_with_the_same_digest(
        corpus: Path, tmp_path: Path, small_batches: None, point: str, workers: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py", point, str(workers), corpus, tmp_path / "killed"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    orphans = [int(pid) for pid in killed.stdout.split()]
    assert len(orphans) == (2 if workers == 2 else 0)
    deadline_s = time.monotonic() + 10
    while not all(map(_ended, orphans)):
        assert time.monotonic() < deadline_s, "workers outlive their parent"
        time.sleep(0.02)
    [folder] = (path for path in (tmp_path / "killed").iterdir() if path.is_dir())
    finished = len(list(folder.glob("0*.json")))
    with pytest.raises(CacheError, match=r"not complete.*prepare it \(again\)"):
        open_cache(folder)

    written = []
    write = shards.Writer.write
    monkeypatch.setattr(shards.Writer, "write", lambda self, batch, *rest: (written.append(batch.number),
                                                                            write(self, batch, *rest))[1])
    resumed, whole = make(corpus, tmp_path / "killed"), make(corpus, tmp_path / "whole")
    batches = len(whole.manifest["shards"])
    assert finished >= 2 and len(written) == (batches - finished) + batches
    assert resumed.manifest == whole.manifest
    assert sorted(file.name for file in resumed.path.iterdir()) == sorted(file.name for file in whole.path.iterdir())


def test_text_that_changed_between_attempts_is_encoded_anew(
        corpus: Path, texts: list[str], tmp_path: Path, small_batches: None, write_jsonl: Callable[..., Path]) -> None:
    old = make(corpus, tmp_path, tokenizer="gpt2")
    (old.path / "manifest.json").unlink()
    shutil.rmtree(corpus)
    write_jsonl(corpus, ["A new first document.", *texts[:300]])
    fresh = make(corpus, tmp_path / "fresh", tokenizer="gpt2")
    mixed = make(corpus, tmp_path, tokenizer="gpt2")
    assert mixed.manifest == fresh.manifest != old.manifest
    assert sorted(file.name for file in mixed.path.iterdir()) == sorted(file.name for file in fresh.path.iterdir())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def flip_a_token(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip_a_token])
def test_damaged_shard_is_named_and_rebuilt_into_the_same_tokens(
        corpus: Path, tmp_path: Path, small_batches: None, damage: Callable[[Path], None]) -> None:
    cache = make(corpus, tmp_path)
    damage(cache.path / "00003.train.arrow")
    with pytest.raises(CacheError, match=r"00003\.train\.arrow .*prepare again") as caught:
        open_cache(cache.path, verify=True)
    assert one_line(caught)
    if damage is flip_a_token:
        assert make(corpus, tmp_path).digest == cache.digest  # size alone cannot tell: only verify can
        (cache.path / "00003.train.arrow").unlink()
    others = {file.name: file.stat().st_mtime_ns for file in cache.path.glob("*.arrow") if "00003" not in file.name}
    assert make(corpus, tmp_path).manifest == cache.manifest
    open_cache(cache.path, verify=True)
    assert {name: (cache.path / name).stat().st_mtime_ns for name in others} == others


def test_an_edited_corpus_is_not_served_from_the_tokens_of_the_old_one(
        corpus: Path, texts: list[str], tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    old = make(corpus, tmp_path, tokenizer="gpt2")
    shutil.rmtree(corpus)
    write_jsonl(corpus, [*texts[:5], texts[5][::-1], *texts[6:]])  # the same number of bytes
    new = make(corpus, tmp_path, tokenizer="gpt2")
    assert new.digest != old.digest
    assert make(corpus, tmp_path, tokenizer="gpt2").path == new.path != old.path


def test_damage_is_not_repaired_with_other_text(
        corpus: Path, texts: list[str], tmp_path: Path, small_batches: None, write_jsonl: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose name stays while its text changes, as a data set on a hub may."""
    local = sources._local
    monkeypatch.setattr(sources, "_local", lambda name: replace(local(name), identity=name))
    cache = make(corpus, tmp_path, tokenizer="gpt2")
    before = {file.name: file.read_bytes() for file in cache.path.iterdir()}
    for changed in ([*texts[:5], "new", *texts[6:]], texts[:-30], [*texts, "one more"]):
        (cache.path / "00003.train.arrow").unlink()
        shutil.rmtree(corpus)
        write_jsonl(corpus, changed)
        with pytest.raises(CacheError, match=r"the text has changed since.*delete the folder") as caught:
            make(corpus, tmp_path, tokenizer="gpt2")
        assert one_line(caught)
        after = {file.name: file.read_bytes() for file in cache.path.iterdir()}
        assert after.items() <= before.items()  # 00003 may be back, with its old tokens
        (cache.path / "00003.train.arrow").touch()


def test_damage_is_not_repaired_with_another_encoder(
        corpus: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(corpus, tmp_path)
    (cache.path / "00003.train.arrow").unlink()
    encode = shards.encode
    monkeypatch.setattr(shards, "encode", lambda *arguments: encode(*arguments)[::-1])
    with pytest.raises(CacheError, match=r"00003\.train\.arrow cannot be restored.*delete the folder"):
        make(corpus, tmp_path)
    assert not (cache.path / "00003.train.arrow").exists()


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}'])
def test_damaged_manifest_is_refused(corpus: Path, tmp_path: Path, content: str) -> None:
    cache = make(corpus, tmp_path)
    (cache.path / "manifest.json").write_text(content)
    for attempt in (lambda: open_cache(cache.path), lambda: make(corpus, tmp_path)):
        with pytest.raises(CacheError, match=r"manifest\.json is damaged.*delete the folder") as caught:
            attempt()
        assert one_line(caught)


def test_edited_manifest_and_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    cache = make(corpus, tmp_path)
    tokenizer_file, manifest_file = cache.path / "tokenizer.json", cache.path / "manifest.json"
    tokenizer_file.write_text(tokenizer_file.read_text().replace('"h"', '"hh"', 1))
    with pytest.raises(CacheError, match=r"tokenizer\.json is missing or changed"):
        open_cache(cache.path, verify=True)
    manifest = json.loads(manifest_file.read_text())
    manifest["spec"]["boundary"] = "eos"
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="is damaged or of another version"):
        open_cache(cache.path)


def test_too_small_a_disk_is_refused_before_writing(
        corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CacheError, match=r"no disk space: about .* GB are needed.*free some") as caught:
        make(corpus, tmp_path)
    assert one_line(caught)
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_up_leaves_no_partial_file_and_can_be_resumed(
        corpus: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 20:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", full)
        with pytest.raises(CacheError, match=r"no disk space left.*run again") as caught:
            make(corpus, tmp_path)
    assert one_line(caught)
    assert list(tmp_path.rglob("0*.json")) and not list(tmp_path.rglob("*.tmp"))
    assert make(corpus, tmp_path).manifest == make(corpus, tmp_path / "whole").manifest


def test_dead_worker_is_reported_and_its_work_is_done_on_the_next_run(
        corpus: Path, tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sources._rows

    def rows_with_a_death(*arguments: Any) -> Iterator[str]:
        for text in rows(*arguments):
            if list(tmp_path.rglob("0*.json")):
                for child in multiprocessing.active_children():
                    child.kill()
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_rows", rows_with_a_death)
        with pytest.raises(CacheError, match=r"a tokenising process died.*finished batches are kept") as caught:
            make(corpus, tmp_path, workers=2)
    assert one_line(caught)
    assert make(corpus, tmp_path).manifest == make(corpus, tmp_path / "whole").manifest


def test_two_preparers_do_the_work_once(corpus: Path, tmp_path: Path, small_batches: None,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda *arguments: (built.append(1), build(*arguments))[1])
    digests: list[str] = []
    preparers = [threading.Thread(target=lambda: digests.append(make(corpus, tmp_path).digest)) for _ in range(3)]
    for preparer in preparers:
        preparer.start()
    for preparer in preparers:
        preparer.join()
    assert len(built) == 1 and len(digests) == 3 and len(set(digests)) == 1


def test_log_gets_plain_lines_and_silence_on_request(corpus: Path, tmp_path: Path,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    prepare(spec_of(corpus), tmp_path / "a", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert lines and all(line.startswith("tokenising: ") and "MB of text" in line for line in lines)
    prepare(spec_of(corpus), tmp_path / "b", progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("changes", "message"), [
    ({"boundary": "bos"}, "use none or eos"), ({"held_out_percent": 100.0}, "below 100"),
    ({"held_out_percent": -1.0}, "at least 0"), ({"held_out_percent": 0.001}, "steps of 0.01"),
    ({"max_documents": 0}, "at least 1"), ({"tokenizer": "gpt5"}, "use gpt2, or bpe-N"),
    ({"source": "/nowhere"}, "check the path"), ({"held_out_percent": 99.99, "max_documents": 1, "tokenizer": "gpt2"},
                                                 "leaves no training text"),
])
def test_impossible_specs_are_refused_in_one_line(
        corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(corpus, tmp_path / "cache", **changes)
    assert one_line(caught)


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match="not valid Unicode"):
        document_sum("half a pair: \ud800")
