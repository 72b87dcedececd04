"""Values of a device's tensors are read once per tensor, also through its views."""

from __future__ import annotations

import torch

from densegrpo_fast.compat.host_values import HostReader, host_values


def test_views_of_one_tensor_are_read_once() -> None:
    reader = HostReader()
    times = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(reader.read(times[:, 1]), times[:, 1])
    assert torch.equal(reader.read(times[2]), times[2])
    assert torch.equal(reader.read(times[1, 3].expand(5)), torch.full((5,), 7.0))
    assert torch.equal(reader.read(times), times) and reader.reads == 1
    read = reader.read(times)
    assert read.data_ptr() != times.data_ptr()
    times[0, 1] = -1
    assert reader.read(times[:, 1]).tolist() == [-1, 5, 9] and reader.reads == 2
    with torch.no_grad():
        assert reader.read(times[0]).tolist() == [0, -1, 2, 3] and reader.reads == 2


def test_memory_that_is_used_again_is_read_again() -> None:
    reader = HostReader(capacity=2)
    for value in range(20):
        # As soon as a tensor is forgotten, another one may get its memory.
        assert reader.read(torch.full((4,), float(value))).tolist() == [value] * 4
    assert reader.reads == 20


def test_tensors_that_cannot_be_followed_are_read_each_time() -> None:
    reader = HostReader()
    with torch.inference_mode():
        hidden = torch.ones(3)
    for tensor in (hidden, torch.ones(1 << 15), torch.arange(6.0).reshape(2, 3).T.contiguous().T[0]):
        before = reader.reads
        for _ in range(2):
            assert torch.equal(reader.read(tensor), tensor)
        assert reader.reads >= before + 1
    large = torch.arange(float(1 << 15))
    before = reader.reads
    assert reader.read(large[5:7]).tolist() == [5.0, 6.0]
    assert reader.reads == before + 1


def test_values_of_any_dtype() -> None:
    assert host_values(torch.tensor([[1, 2], [3, 4]])) == (1.0, 2.0, 3.0, 4.0)
    assert host_values(torch.tensor(0.5, dtype=torch.bfloat16).requires_grad_()) == (0.5,)
    assert host_values(torch.tensor([0.1])) == (torch.tensor(0.1).item(),)


def test_several_tensors_are_read_in_one_copy() -> None:
    reader = HostReader()
    times, sigmas, steps = torch.arange(12.0).reshape(3, 4), torch.tensor([1.0, 0.3, 0.0]), torch.tensor([5, 2**40 + 1])
    reader.read_ahead(times[1], sigmas, steps)
    assert reader.reads == 1
    for tensor in (times, times[:, 2], sigmas, steps):
        assert torch.equal(reader.read(tensor), tensor) and reader.read(tensor).dtype == tensor.dtype
    assert reader.reads == 1
    # what is known is not read again, and a single one is left to be read when it is wanted
    reader.read_ahead(times, sigmas, steps)
    sigmas[1] = 0.25
    reader.read_ahead(times, sigmas, steps)
    assert reader.reads == 1
    assert reader.read(sigmas).tolist() == [1.0, 0.25, 0.0] and reader.reads == 2
    fresh = torch.arange(4.0)
    reader.read_ahead(fresh, fresh[1:])  # one tensor and a view of it are one
    assert reader.reads == 2
    with torch.inference_mode():
        hidden = torch.ones(2)
    reader.read_ahead(hidden, torch.ones(3), torch.ones(1 << 15))
    assert reader.reads == 2
