"""A recall task is a function of its keys, the split, the number of the example and the length, and of nothing else."""

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.data import recall
from services.data.corpus import open_corpus, prepare_corpus, spec_of
from services.data.recall import ExampleStream, RecallData, is_held_out
from services.study.recall_task import TASKS, Induction, Mqar, Needle, Task, TaskError

NOWHERE = Path("/nowhere")


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    kind = draw(st.sampled_from([Mqar, Induction, Needle]))
    keys: dict[str, Any] = {"vocab_size": draw(st.integers(16, 300))}
    if kind is not Induction:
        keys["pairs"] = draw(st.integers(1, keys["vocab_size"] // 4))
        keys["queries"] = draw(st.none() | st.integers(1, keys["pairs"]))
    if kind is Mqar:
        keys["power"] = draw(st.floats(0.01, 2.0))
    return kind(**keys)


cases = given(tasks(), st.integers(0, 40), st.integers(0, 999), st.sampled_from(["train", "held_out"]))


@settings(deadline=None)
@cases
def test_every_example_has_its_answers_where_the_sequence_says_them(task: Task, longer: int, i: int, split: str) -> None:
    tokens, targets = ExampleStream(task, split).example(i, task.shortest + longer + 8)
    asked = np.flatnonzero(targets != recall.NO_TARGET)
    assert len(asked) == task.answers and tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert is_held_out(tokens) == (split == "held_out")
    for at in asked:
        said = np.flatnonzero(tokens[:at] == tokens[at])
        first = _where_said(task, tokens, said)
        assert tokens[first + 1] == targets[at]


def _where_said(task: Task, tokens: Any, said: Any) -> int:
    """The place where a key's value follows it; in mqar filler may repeat a key, later than the pairs."""
    if isinstance(task, Mqar):
        (at,) = [place for place in said if place < 2 * task.pairs]
        assert at % 2 == 0
    else:
        (at,) = said
    return int(at)


@settings(deadline=None, max_examples=25)
@cases
def test_an_example_does_not_depend_on_what_was_generated_before(task: Task, longer: int, i: int, split: str) -> None:
    length = task.shortest + longer + 8
    used, fresh = ExampleStream(task, split), ExampleStream(task, split)
    for other in (3, 1, 2):
        used.example(other, length + 1), used.example(other, length)
    for one, two in zip(used.example(i, length), fresh.example(i, length), strict=True):
        assert (one == two).all()


def test_more_examples_leave_the_first_ones_as_they_were() -> None:
    few, many = ExampleStream(Mqar(train_examples=10), "train"), ExampleStream(Mqar(train_examples=10_000), "train")
    assert all((few.example(i, 64)[0] == many.example(i, 64)[0]).all() for i in range(10))
    with pytest.raises(IndexError, match="example 10 of 10"):
        few.example(10, 64)


@pytest.mark.parametrize("task", [Mqar(vocab_size=8, pairs=1), Induction(vocab_size=5), Needle(vocab_size=8)])
def test_held_out_examples_are_never_trained_on_even_where_few_exist(task: Task) -> None:
    train, held_out = ({tuple(ExampleStream(task, split).example(i, 4)[0]) for i in range(400)} for split in recall.SPLITS)
    assert len(train) > 10 and len(held_out) > 3
    assert not train & held_out


def test_examples_are_those_of_this_format() -> None:
    """Exact values: a change here changes what equal studies train on, and needs another FORMAT."""
    small = {"mqar": Mqar(vocab_size=32, pairs=2), "induction": Induction(vocab_size=32), "needle": Needle(vocab_size=32)}
    found = {name: ExampleStream(task, "train").example(7, 8)[0].tolist() for name, task in small.items()}
    assert found == {
        "mqar": [2, 27, 3, 26, 3, 13, 2, 28],
        "induction": [19, 0, 26, 9, 1, 22, 5, 0],
        "needle": [26, 27, 5, 8, 22, 26, 29, 5],
    }


def test_queries_follow_the_power_law() -> None:
    """With power 0.01 the first of 28 places is asked 1 / sum(x^-0.99) of the time; power 1 asks everywhere alike."""
    n, places = 3000, 28
    for power, share in ((0.01, 1 / sum(x**-0.99 for x in range(1, places + 1))), (1.0, 1 / places)):
        stream = ExampleStream(Mqar(pairs=4, queries=1, power=power), "train")
        at = Counter(int(np.argmax(stream.example(i, 8 + 2 * places)[1] >= 0)) for i in range(n))
        assert set(at) <= set(range(8, 8 + 2 * places, 2))
        assert at[8] / n == pytest.approx(share, abs=4 * (share / n) ** 0.5)  # four standard deviations


def test_needles_lie_at_every_depth_and_answers_are_equally_likely() -> None:
    task = Needle(vocab_size=16, pairs=2, queries=1)
    depths: Counter[int] = Counter()
    answers: Counter[int] = Counter()
    stream = ExampleStream(task, "train")
    for i in range(2000):
        tokens, targets = stream.example(i, 12)
        depths.update(np.flatnonzero(tokens[:-1] < 4).tolist())
        answers[int(targets[-1])] += 1
    assert set(depths) == set(range(10))
    assert set(answers) == {4, 5, 6, 7}
    assert max(answers.values()) < 1.3 * min(answers.values())
    assert stream.target_entropy(5, 12) == pytest.approx(np.log(4))


def test_the_digest_stands_for_keys_and_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {
        RecallData(task, NOWHERE).digest
        for task in (Mqar(), Mqar(pairs=4), Mqar(power=0.5), Mqar(train_examples=7), Induction(), Needle())
    }
    assert len(digests) == 6
    known = RecallData(Mqar(), NOWHERE).digest
    assert RecallData(Mqar(), NOWHERE).digest == known
    monkeypatch.setattr(recall, "HELD_OUT_BELOW", 32)
    assert RecallData(Mqar(), NOWHERE).digest != known


def test_a_task_is_opened_from_what_the_manifest_keeps_and_writes_nothing(tmp_path: Path) -> None:
    made = prepare_corpus(spec_of({"source": "needle", "recall": {"pairs": 2}}), tmp_path)
    again = open_corpus(made.path, made.manifest["spec"])
    assert again.digest == made.digest and again.vocab_size == 256
    assert list(tmp_path.iterdir()) == []
    assert made.held_out.windows(64) == 1000 and made.train.tokens(64) == 6_400_000
    assert made.held_out.targets(10, 64) == 20
    assert made.held_out.excerpt(200, 64).shape == (3, 64)


@pytest.mark.parametrize(("task", "length"), [(Mqar(pairs=2), 7), (Induction(), 2), (Needle(pairs=2), 5)])
def test_a_sequence_that_does_not_hold_the_task_is_refused(task: Task, length: int) -> None:
    with pytest.raises(TaskError, match=f"takes at least {length + 1} tokens; raise seq_len") as caught:
        ExampleStream(task, "train").windows(length)
    assert "\n" not in str(caught.value)
    ExampleStream(task, "train").windows(max(8, length + 1))


def test_a_task_with_hardly_any_sequences_is_refused() -> None:
    outcomes = []
    for vocab_size, split in product((4, 5), recall.SPLITS):
        try:
            outcomes.append(ExampleStream(Induction(vocab_size=vocab_size), split).windows(3))
        except TaskError as error:
            outcomes.append("too few different ones" in str(error))
    assert True in outcomes, outcomes


def test_every_task_has_a_generator() -> None:
    assert set(recall._GENERATORS) == set(TASKS.values())
