"""State dicts copied to host memory: shared storages once, and as they were."""

import io
from collections import OrderedDict
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sat.training.staging import HostMemory, Staging


def size(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def staged(*values: Any, memory: HostMemory | None = None) -> list[Any]:
    staging = Staging(memory or HostMemory())
    numbers = [staging.add(value) for value in values]
    staging.copy()
    staging.hold_stream()
    staging.wait()
    return [staging.get(number) for number in numbers]


class Scaler:
    def __init__(self) -> None:
        self.scale = 2.0
        self.history = [torch.ones(3)]


def test_views_of_one_buffer_share_one_copy() -> None:
    flat = torch.arange(10_000, dtype=torch.float32)
    views = OrderedDict(a=flat[:5000], b=flat[5000:].view(50, 100).t(), c=flat[10:20])
    (copy,) = staged(views)
    assert isinstance(copy, OrderedDict) and list(copy) == list(views)
    assert all(torch.equal(copy[name], views[name]) for name in views)
    assert copy["b"].stride() == views["b"].stride()
    assert len({view.untyped_storage().data_ptr() for view in copy.values()}) == 1
    assert copy["a"].untyped_storage().nbytes() == flat.untyped_storage().nbytes()
    assert size(copy) <= size(views) < 2 * flat.nbytes


def test_two_state_dicts_share_one_copy_and_hold_no_more_than_their_own() -> None:
    shared, own = torch.randn(1000), torch.randn(50)
    first, second = staged({"x": shared}, {"x": shared[10:], "y": own})
    assert first["x"].untyped_storage().data_ptr() == second["x"].untyped_storage().data_ptr()
    assert size({"y": own}) == size({"y": second["y"]})


def test_later_changes_are_not_seen() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    scaler, groups = Scaler(), [{"lr": 0.1}]
    value = {"weight": weight, "scaler": scaler, "groups": groups, "step": torch.tensor(3)}
    before = weight.detach().clone()
    staging = Staging(HostMemory())
    number = staging.add(value)
    groups[0]["lr"] = 0.2
    scaler.scale = 1.0
    staging.copy()
    with torch.no_grad():
        weight.zero_()
        scaler.history[0].zero_()
        value["step"] += 1
    staging.wait()
    copy = staging.get(number)
    assert torch.equal(copy["weight"], before) and type(copy["weight"]) is Tensor
    assert (copy["groups"], copy["scaler"].scale, int(copy["step"])) == ([{"lr": 0.1}], 2.0, 3)
    assert torch.equal(copy["scaler"].history[0], torch.ones(3))


def test_empty_tensors_and_types() -> None:
    values = [torch.empty(0), torch.empty(0, dtype=torch.bfloat16), torch.tensor(True)]
    values += [torch.zeros((), dtype=torch.int64), torch.empty(0, 3)]
    (copy,) = staged(values)
    assert [(c.dtype, c.shape) for c in copy] == [(v.dtype, v.shape) for v in values]


def test_memory_is_kept_from_save_to_save() -> None:
    memory = HostMemory()
    large, small = torch.randn(1000), torch.randn(10)
    (first,) = staged({"x": large}, memory=memory)
    address = first["x"].data_ptr()
    (second,) = staged({"x": small, "y": large}, memory=memory)
    assert torch.equal(second["x"], small) and torch.equal(second["y"], large)
    (third,) = staged({"x": large + 1}, memory=memory)
    assert third["x"].data_ptr() == second["x"].data_ptr() != 0
    assert address and torch.equal(third["x"], large + 1)


def test_memory_that_cannot_be_locked_is_a_fault_and_leaves_no_error(monkeypatch) -> None:
    memory, asked = HostMemory(), []
    memory.stream = mock.Mock()
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: mock.Mock(cudaHostRegister=lambda *_: 2), raising=False
    )

    def kernel(*_: Any, **__: Any) -> None:
        asked.append("kernel")
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", kernel)
    memory.reserve(100)
    assert memory.fault == "cudaHostRegister: error 2" and asked == ["kernel"]


@pytest.mark.gpu
def test_kernels_run_after_memory_could_not_be_locked(monkeypatch) -> None:
    first, second = HostMemory(), HostMemory()
    first.reserve(1 << 20)
    assert first.fault is None
    with monkeypatch.context() as context:
        context.setattr(np, "empty", lambda *_, **__: first._block)  # which is locked already
        second.reserve(1 << 20)
    assert second.fault is not None
    assert torch.full((3,), 2.0, device="cuda").sum() == 6
    first.close()


@pytest.mark.gpu
def test_copies_from_a_gpu_run_beside_what_does_not_change_the_tensors() -> None:
    memory = HostMemory()
    flat = torch.randn(1 << 28, device="cuda")  # a GiB, so that the copy takes a while
    expected = flat.cpu()
    for _ in range(2):  # the second time in memory that is there
        staging = Staging(memory)
        number = staging.add({"a": flat[:1000], "b": flat[1000:]})
        staging.copy()
        assert memory.fault is None
        began = torch.cuda.Event()
        began.record()
        began.synchronize()
        assert staging._copied is not None and not staging._copied.query()  # nobody waited for it
        staging.hold_stream()
        flat.zero_()
        staging.wait()
        copy = staging.get(number)
        assert torch.equal(copy["a"], expected[:1000]) and torch.equal(copy["b"], expected[1000:])
        assert size(copy) < expected.nbytes + 10_000
        flat.copy_(expected)
    memory.close()
