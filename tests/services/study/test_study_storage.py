"""A write happened or did not, names stay below the root, and a folder and an object store behave alike."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import namedtuple
from pathlib import Path

import pytest

from services.study.storage import Storage, StorageError, canonical_json, write_atomically


@pytest.fixture(params=["folder", "object store"])
def place(request, tmp_path):
    """An empty storage of either kind."""
    return Storage(str(tmp_path / "root") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/root")


def refused(call, *args):
    with pytest.raises(StorageError) as caught:
        call(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_what_is_written_is_read_and_what_is_not_is_none(place):
    assert place.read("a/b") is None and not place.exists("a")
    place.write("a/b", b"one")
    place.write("a/b", b"two")
    assert place.read("a/b") == b"two" and place.exists("a/b") and place.exists("a")
    assert place.read("a") is None and place.read("a/b/c") is None
    assert place.size("a/b") == 3 and place.size("absent") == 0


def test_list_gives_the_names_of_a_folder_sorted(place):
    for name in ("f/b", "f/a", "f/sub/x", "g/c", "f/.hidden"):
        place.write(name, b"12")
    assert place.list("f") == ["a", "b", "sub"]
    assert place.list("absent") == [] and place.list("f/a") == []
    assert place.size("f/sub") == 2


def test_delete_takes_a_file_or_a_folder_and_nothing_is_no_error(place):
    for name in ("f/a", "f/sub/x", "other"):
        place.write(name, b"1")
    place.delete("f/a")
    assert place.list("f") == ["sub"]
    place.delete("f")
    place.delete("f")
    assert place.list("f") == [] and place.read("other") == b"1"


def test_read_from_gives_the_new_part_and_none_for_a_file_cut_short(place):
    assert place.read_from("log", 0) is None
    place.write("log", b"0123456789")
    assert place.read_from("log", 0) == b"0123456789"
    assert place.read_from("log", 7) == b"789"
    assert place.read_from("log", 10) == b""
    assert place.read_from("log", 11) is None


def test_a_folder_goes_up_and_comes_back(place, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"a")
    (source / "deep" / "b.bin").write_bytes(bytes(range(256)))
    place.put_folder(source, "copy")
    with place.local_copy("copy") as folder:
        found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"a.txt": b"a", "deep/b.bin": bytes(range(256))}
    assert folder.exists() == (place.local_path is not None)  # a download is removed again, the place itself is not


def test_a_child_is_rooted_below(place):
    place.child("trials/x").write("y", b"1")
    assert place.read("trials/x/y") == b"1"
    assert Storage(place.root).read("trials/x/y") == b"1"


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a/", "..", "a/.."])
def test_a_name_that_leaves_the_root_is_refused_by_every_call(place, name, tmp_path):
    (tmp_path / "x").write_bytes(b"outside")
    for call in (place.read, place.list, place.delete, place.size, place.exists, place.child):
        assert f"storage name {name!r} leaves its root" in refused(call, name)
    refused(place.write, name, b"inside")
    refused(place.read_from, name, 0)
    assert (tmp_path / "x").read_bytes() == b"outside"


def test_a_link_that_leaves_the_root_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"1")
    place = Storage(str(tmp_path / "root"))
    place.write("a", b"1")
    (tmp_path / "root" / "link").symlink_to(outside)
    for call in (place.read, place.delete):
        assert "through a link" in refused(call, "link/x")
    refused(place.delete, "link")
    refused(place.write, "link/x", b"2")
    assert (outside / "x").read_bytes() == b"1"


def test_a_root_that_is_a_link_itself_is_usable(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    place = Storage(str(tmp_path / "runs"))
    place.write("a/b", b"1")
    assert place.read("a/b") == b"1" and (tmp_path / "disk" / "a" / "b").exists()


WRITER = """
import sys
from pathlib import Path
from services.study.storage import write_atomically
target = Path(sys.argv[1])
for number in range(10**9):
    write_atomically(target, bytes([number % 256]) * 3_000_000)
    if number == 0:
        print("writing", flush=True)
"""


def test_a_reader_never_sees_part_of_a_write_and_a_killed_writer_leaves_a_whole_file(tmp_path, process_env):
    place = Storage(str(tmp_path / "root"))
    seen = set()
    for attempt in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "root" / "file")], env=process_env, stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"writing\n"
        end = time.monotonic() + 0.3 + 0.013 * attempt
        while time.monotonic() < end:
            data = place.read("file")
            assert len(data) == 3_000_000 and data == data[:1] * 3_000_000
            seen.add(data[0])
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=30) == -signal.SIGKILL
        writer.stdout.close()
        data = place.read("file")
        assert len(data) == 3_000_000 and data == data[:1] * 3_000_000
        assert place.list(".") == ["file"]
    assert len(seen) > 3  # the reader did watch a file that changed


def test_a_write_that_fails_leaves_the_old_content_and_no_scrap(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**29))
    place = Storage(str(tmp_path / "new" / "deep"))
    place.check_writable(2**29)
    said = refused(place.check_writable, 2**31)
    assert "2.00 GiB needed, 0.50 GiB free" in said and "choose another with --storage" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "/deep/er"])
def test_a_file_where_the_folder_should_be_is_refused(tmp_path, below):
    (tmp_path / "file").write_bytes(b"")
    said = refused(Storage(f"{tmp_path}/file{below}").check_writable)
    assert f"{tmp_path}/file is no folder that can be written; choose another with --storage" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(Storage(str(tmp_path / "locked" / "runs")).check_writable)


def test_a_writable_place_is_left_as_it_was(tmp_path):
    Storage(str(tmp_path / "runs")).check_writable(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "gs2://b"])
def test_an_unknown_protocol_is_refused(url):
    assert f"storage {url!r}: " in refused(Storage, url)


def test_a_relative_folder_is_absolute_for_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("runs/").root == str(tmp_path / "runs") and Storage("runs").local_path == tmp_path / "runs"
    assert Storage(f"file://{tmp_path}/runs").local_path == Path(tmp_path / "runs")


def test_canonical_json_has_one_spelling_and_no_nan():
    assert canonical_json({"b": 1.0, "a": [True, None]}) == canonical_json({"a": [True, None], "b": 1.0})
    assert canonical_json({"b": 1.0, "a": "é"}) == '{"a":"\\u00e9","b":1.0}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))
