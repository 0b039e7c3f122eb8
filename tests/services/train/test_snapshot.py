"""The copy that a checkpoint is written from: the same file as from the state itself, whatever happens to the state after."""

import hashlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from services.train.snapshot import HostMemory, Snapshot


def state():
    """Views of one storage, a module with a tied weight, an optimizer after a step, and values that are no tensors."""
    torch.manual_seed(3)
    flat = torch.randn(40)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    flat_parameter = nn.Parameter(torch.randn(5))
    flat_parameter.mark = 7
    return {
        "views": [flat[:10], flat[10:30].view(4, 5), flat[::3]],
        "module": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "more": (OrderedDict(a=flat_parameter), torch.zeros(0), {"words": list(range(5)), "none": None}),
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_from_the_copy_is_the_file_from_the_state_although_training_went_on(tmp_path):
    original = state()
    torch.save(original, tmp_path / "state.pt")
    expected = digest(tmp_path / "state.pt")
    snapshot = Snapshot({"below/state.pt": original}, {"code.py": tmp_path / "state.pt"})
    original["views"][0].add_(1.0)
    original["module"]["0.weight"].zero_()
    original["optimizer"]["state"][0]["exp_avg"].zero_()
    original["more"][2]["words"].append(1)
    written = snapshot.write(tmp_path / "new")
    assert sorted(path.name for path in written) == ["code.py", "state.pt"]
    assert not (tmp_path / "new" / "state.pt").exists()
    assert digest(tmp_path / "new" / "below" / "state.pt") == expected


def test_buffers_serve_one_copy_after_another_and_follow_a_state_that_changes_its_size():
    memory = HostMemory()
    for value, size in ((1.0, 6), (2.0, 6), (3.0, 9), (4.0, 2)):
        tensors = [torch.full((size,), value), torch.full((3,), -value, dtype=torch.float64)]
        memory.begin()
        copied = memory.copied({"a": tensors})["a"]
        memory.end()
        assert all(torch.equal(one, other) for one, other in zip(copied, tensors, strict=True))
        assert all(one.data_ptr() != other.data_ptr() for one, other in zip(copied, tensors, strict=True))


@pytest.mark.gpu
def test_a_copy_from_a_gpu_is_whole_before_the_next_step():
    device = torch.randn(1 << 22, device="cuda")
    expected = device.cpu()
    snapshot = Snapshot({"x": device}, {})
    device.zero_()
    assert torch.equal(snapshot._states["x"], expected)
    assert snapshot._states["x"].device.type == "cpu"
