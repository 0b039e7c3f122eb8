"""A function done from a list gives what it gives when it is called, for tensors of every kind, and only where it may."""

import ctypes
import gc

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import launching, replay
from kernels.replay import replayed


class Adder:
    """y[i] = x[i] + more[i] + number for `count` numbers in fp32, launched as a Triton kernel is, on a CPU's memory."""

    arg_names = ("x", "more", "y", "number", "count")

    def __init__(self):
        self.compiled = 0

    def __getitem__(self, grid):
        def compile_and_launch(**arguments):
            self.compiled += 1
            given = [arguments[name] for name in self.arg_names]
            self.add(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given))
            return {(*grid, 1, 1)[:3]: self.add}

        return compile_and_launch

    @staticmethod
    def add(x, more, y, number, count):
        x, more, y = (None if a is None else (ctypes.c_float * count).from_address(a) for a in (x, more, y))
        for i in range(count):
            y[i] = x[i] + (0 if more is None else more[i]) + number


@pytest.fixture
def add():
    replay._lists.clear()
    launching._places.clear()
    kernel = Adder()
    yield kernel
    replay._lists.clear()
    launching._places.clear()


def added(kernel, x, more=None, number=1.0):
    y = x.new_empty(x.shape)
    launching.launch(kernel, (1,), {"x": x, "more": more, "y": y, "number": number, "count": x.numel()})
    return y


def lists():
    return sum(isinstance(x, replay._List) for x in replay._lists.values())


def three_times(function, given, key=("test",)):
    """Results for three sets of tensors of the same shapes: called, written down and done from the list, done from it again."""
    for tensors in given:
        copies = [None if x is None else x.clone() for x in tensors]
        found, wanted = replayed(function, tensors, key), function(*copies)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert all(x is None or torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FUNCTIONS = {
    "a launch": lambda add, x, y: (added(add, x),),
    "launches one after another": lambda add, x, y: (added(add, added(add, x), y, 2.0), None),
    "two results, one of them given": lambda add, x, y: (added(add, y), x),
    "the same twice": lambda add, x, y: (z := added(add, x), z),
    "operations between": lambda add, x, y: (added(add, added(add, x).sum(dim=0, keepdim=True).expand(3, 4).contiguous()),),
    "a view": lambda add, x, y: (added(add, x)[1:], added(add, x.T.contiguous()).T),
    "in place": lambda add, x, y: (added(add, x).zero_().add_(y), added(add, x).mul_(2)),
    "in place, of what a launch then reads": lambda add, x, y: (added(add, torch.empty_like(x).fill_(3.0), y),),
    "several results of an operation": lambda add, x, y: (*added(add, x).max(dim=1), *torch.stack([x, added(add, y)]).unbind()),
    "another dtype": lambda add, x, y: (added(add, x).to(torch.float16), added(add, x.double().float())),
    "made of nothing": lambda add, x, y: (added(add, torch.zeros(3, 4, device=x.device)), torch.arange(5, device=x.device)),
    "nothing": lambda add, x, y: (None, None),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_list_gives_what_the_function_gives(function, add):
    given = [(numbers(3, 4, seed=i), numbers(3, 4, seed=9 - i)) for i in range(4)]
    three_times(lambda x, y: function(add, x, y), given)
    assert lists() == 1


def test_a_tensor_that_is_not_given_is_none(add):
    three_times(lambda x, y: (added(add, x, y),), [(numbers(6, seed=i), None) for i in range(3)])
    assert lists() == 1


def test_the_function_is_not_called_from_the_third_time_on(add):
    calls = []

    def function(x):
        calls.append(x.device.type)
        return (added(add, x),)

    for i in range(6):
        replayed(function, (numbers(6, seed=i),), ())
    assert calls == ["cpu", "meta"]


@pytest.mark.parametrize(
    "changed",
    [numbers(7, seed=1), numbers(12, seed=1)[::2], numbers(6, seed=1).double(), None],
    ids=["a shape", "strides", "a dtype", "none"],
)
def test_other_tensors_have_another_list(changed, add):
    def function(x, y):
        return (added(add, x), None if y is None else y * 2)

    x = numbers(6, seed=0)
    three_times(function, [(x, x), (x, x), (x, changed), (x, changed), (x, changed), (x, x)])
    assert lists() == 2


def test_another_key_has_another_list(add):
    x = numbers(6, seed=0)
    for number in (1.0, 2.0, 1.0, 2.0, 1.0, 2.0):
        (found,) = replayed(lambda x, number=number: (added(add, x, number=number),), (x,), (number,))
        assert torch.equal(found, x + number)
    assert lists() == 2


def test_unaligned_tensors_are_given_to_the_function_itself(add):
    calls = []

    def function(x):
        calls.append(x.device.type)
        return (added(add, x),)

    unaligned = [numbers(7, seed=i)[1:] for i in range(4)]
    assert all(x.data_ptr() % launching.ALIGNMENT for x in unaligned)
    three_times(function, [(x,) for x in unaligned])
    assert calls.count("cpu") == 8  # half of them by the test


ELSEWHERE = torch.full((6,), 2.0)
VALUES = {
    "a shape that follows from values": lambda x: (x[x > 0],),
    "a number": lambda x: (x * x[0].item(),),
    "a branch": lambda x: (x + 1 if x[0] > 0 else x - 1,),
    "a tensor from elsewhere": lambda x: (x + ELSEWHERE,),
    "a tensor made of a number": lambda x: (x + torch.tensor(2.0),),
}


@pytest.mark.parametrize("function", VALUES.values(), ids=VALUES)
def test_what_no_list_can_say_is_called_as_it_is(function, add):
    three_times(function, [(numbers(6, seed=i),) for i in range(5)])


def test_another_device_has_another_list(add):
    for _ in range(3):
        replayed(lambda x: (x * 2, x.new_empty(3)), (numbers(6, seed=0),), ())
    for _ in range(3):
        found = replayed(lambda x: (x * 2, x.new_empty(3)), (numbers(6, seed=0).to("meta"),), ())
        assert all(x.is_meta for x in found)


def test_an_error_of_the_function_is_an_error(add):
    def function(x):
        raise ValueError("x of shape (6,): too short")

    for _ in range(3):
        with pytest.raises(ValueError, match="too short"):
            replayed(function, (numbers(6, seed=0),), ())


def test_what_nothing_needs_any_more_is_let_go(add, monkeypatch):
    """Of a chain each tensor is needed by the next alone: with the one given there are never more than three."""
    alive = []

    def chain(x):
        for _ in range(8):
            x = added(add, x)
        return (x,)

    def counted(*arguments):
        if len(alive) >= 24:  # of the last call, done from its list
            gc.collect()
        alive.append(sum(type(y) is torch.Tensor and y.shape == (7, 13) and not y.is_meta for y in gc.get_objects()))
        return original(*arguments)

    original = add.add
    monkeypatch.setattr(add, "add", counted)
    for i in range(4):
        replayed(chain, (numbers(7, 13, seed=i),), ())
    assert lists() == 1 and len(alive) == 32
    assert max(alive[-8:]) <= 3


def test_lists_do_not_grow_without_end(add, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    for length in range(1, 12):
        three_times(lambda x: (added(add, x),), [(numbers(4 * length, seed=i),) for i in range(3)])
    assert len(replay._lists) <= 4
