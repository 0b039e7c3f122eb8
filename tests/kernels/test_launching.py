"""A launch is remembered under all that a compiled kernel depends on; its arguments come in the order of the signature."""

import pytest
import torch

from decay_core import kernel_seam  # noqa: F401  makes kernels/ importable
from kernels import launching
from kernels.launching import cdiv, launch, next_power_of_2


class Kernel:
    """Keeps a record of what it is compiled for and launched with, as Triton's kernel would be."""

    arg_names = ("x", "y", "count", "WIDTH")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(**arguments):
            self.compiled.append((grid, arguments))
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def kernel():
    launching._places.clear()
    yield Kernel()
    launching._places.clear()


def arguments(**changes):
    # the order of the call is not that of the signature
    return {"WIDTH": 64, "y": None, "x": torch.zeros(8), "count": 3, **changes}


def test_the_second_launch_is_the_compiled_kernel_with_its_own_tensors_in_the_signatures_order(kernel):
    launch(kernel, (5,), arguments(), num_warps=4)
    again = arguments()
    launch(kernel, (5,), again, num_warps=4)
    assert len(kernel.compiled) == 1 and kernel.compiled[0][1]["num_warps"] == 4
    ((grid, given),) = kernel.launched
    assert grid == (5, 1, 1) and given == (again["x"].data_ptr(), None, 3, 64)


def test_each_launch_has_its_own_tensors_and_the_remembered_one_keeps_none_of_them(kernel):
    tensors = [torch.zeros(8) for _ in range(3)]
    for x in tensors:
        launch(kernel, (5,), arguments(x=x, y=x))
    assert [given[:2] for _, given in kernel.launched] == [(x.data_ptr(), x.data_ptr()) for x in tensors[1:]]


def test_arguments_in_another_order_are_the_same_to_the_kernel(kernel):
    for _ in range(2):
        launch(kernel, (5,), arguments())
        launch(kernel, (5,), dict(reversed(arguments().items())))
    assert len(kernel.compiled) == 2 and [given[1:] for _, given in kernel.launched] == [(None, 3, 64)] * 2


@pytest.mark.parametrize(
    "changes",
    [{"count": 4}, {"WIDTH": 32}, {"x": torch.zeros(8, dtype=torch.float16)}, {"y": torch.zeros(8)}],
    ids=["a number", "a constant", "a dtype", "a tensor that was none"],
)
def test_what_a_compiled_kernel_depends_on_is_asked_for_anew(kernel, changes):
    launch(kernel, (5,), arguments())
    launch(kernel, (5,), arguments(**changes))
    assert len(kernel.compiled) == 2 and not kernel.launched


@pytest.mark.parametrize("again", [{"grid": (6,)}, {"num_warps": 8}], ids=["the grid", "the warps"])
def test_the_grid_and_the_options_count_as_well(kernel, again):
    launch(kernel, (5,), arguments(), num_warps=4)
    launch(kernel, again.get("grid", (5,)), arguments(), num_warps=again.get("num_warps", 4))
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_unaligned_tensors_are_neither_remembered_nor_given_what_aligned_ones_were_compiled_for(kernel):
    unaligned = torch.zeros(9)[1:]
    assert unaligned.data_ptr() % launching.ALIGNMENT
    for _ in range(2):
        launch(kernel, (5,), arguments(x=unaligned))
    launch(kernel, (5,), arguments())
    launch(kernel, (5,), arguments(x=unaligned))
    assert len(kernel.compiled) == 4 and not kernel.launched


def test_what_is_remembered_does_not_grow_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launching, "MOST", 3)
    for count in range(10):
        launch(kernel, (5,), arguments(count=count))
    assert sum(len(place.compiled) for place in launching._places.values()) <= 3


def test_a_kernel_with_one_number_or_none(kernel):
    kernel.arg_names = ("x", "count")
    x = torch.zeros(8)
    for given in ({"x": x, "count": 3}, {"x": x}):
        kernel.arg_names = tuple(given)
        for _ in range(2):
            launch(kernel, (5,), given)
    assert [given for _, given in kernel.launched] == [(x.data_ptr(), 3), (x.data_ptr(),)]


def test_an_option_of_another_name_counts(kernel):
    launch(kernel, (5,), arguments(), num_warps=4)
    launch(kernel, (5,), arguments(), num_stages=4)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_a_kernel_that_another_thread_compiles_is_waited_for(kernel):
    class Future:  # as triton.FutureKernel of 3.7: it can be launched, and is no compiled kernel
        def __init__(self, compiled):
            self.compiled = compiled

        def result(self, ignore_errors=False):
            return self.compiled

    class Waiting(Kernel):
        def __getitem__(self, grid):
            compile_and_launch = super().__getitem__(grid)
            return lambda **given: Future(compile_and_launch(**given))

    kernel = Waiting()
    for _ in range(2):
        launch(kernel, (5,), arguments())
    assert len(kernel.compiled) == 1 and len(kernel.launched) == 1


def test_what_is_collected_is_not_launched(kernel):
    given = arguments()
    with launching.collecting() as planned:
        launch(kernel, (5,), given, num_warps=4)
    assert not kernel.compiled and not kernel.launched
    assert planned == [(kernel, (5,), given, {"num_warps": 4})]
    launch(kernel, (5,), given)
    assert len(kernel.compiled) == 1 and len(planned) == 1


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 3, 4, 8), (2, 1, 1, 8)])
def test_strides_are_named_and_those_of_single_entries_are_none(shape):
    x = torch.zeros(shape)
    found = launching.strides("q", x)
    assert list(found) == ["q_b", "q_t", "q_h"]
    assert all(found[name] == (0 if size == 1 else step) for name, size, step in zip(found, x.shape, x.stride(), strict=False))
    assert launching.strides("k", None) == {"k_b": 0, "k_t": 0, "k_h": 0}


def test_the_sizes_are_tritons():
    triton = pytest.importorskip("triton")
    for number in range(1, 300):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert all(cdiv(number, size) == triton.cdiv(number, size) for size in (1, 7, 64))
