"""The binding of the CUDA library, and, with `-m gpu`, what its kernels compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import backends, native_cuda, shared_library
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.noise import gaussian
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_grad_ref, sde_log_prob_ref, sde_step_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

GPU = [pytest.mark.gpu, pytest.mark.skipif(bool(native_cuda.why_not()), reason=native_cuda.why_not())]
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(FLOAT, FLOAT), (FLOAT, HALF), (FLOAT, BFLOAT), (HALF, HALF), (BFLOAT, BFLOAT)]


def test_a_missing_library_is_an_error_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "PACKAGE", tmp_path)
    native_cuda._load.cache_clear()
    assert "was not built; install the CUDA toolkit" in native_cuda.why_not()
    (tmp_path / "_native_cuda.broken.so").write_bytes(b"not a library")
    native_cuda._load.cache_clear()
    assert "_native_cuda.broken.so cannot be loaded" in native_cuda.why_not()
    native_cuda._load.cache_clear()


def test_what_the_library_cannot_serve_is_said_before_it_is_looked_for() -> None:
    assert native_cuda.why_not(torch.zeros(1)) == "it needs tensors on a CUDA device, got cpu"
    with pytest.raises(
        RuntimeError, match="sde_step: implementation 'cuda' cannot serve this call: it needs tensors on"
    ):
        backends.choose("sde_step", "cuda", torch.zeros(1, 1), torch.zeros(1, 1))
    for latents, velocity in PAIRS:
        assert native_cuda._served(latents, velocity)
    for latents, velocity in ((HALF, FLOAT), (HALF, BFLOAT), (FLOAT, torch.float64), (torch.float64, torch.float64)):
        assert not native_cuda._served(latents, velocity)


STEPS, SAMPLES = torch.tensor([0, 2, 9, 4, 7]), torch.tensor([3, 0, 70000, 2**32 - 1, 9])
LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(sd3_sigmas(10), LEVELS, "flow_sde").table


def on_gpu(latents: Tensor, velocity: Tensor, steps: Tensor = STEPS) -> tuple[Tensor, Tensor]:
    return sde_step(
        latents.cuda(),
        velocity.cuda(),
        TABLE.cuda(),
        steps.cuda(),
        seed=1234,
        sample_index=SAMPLES.cuda(),
        iteration=6,
        implementation="cuda",
    )


class TestOnGpu:
    pytestmark = GPU

    @pytest.mark.parametrize("shape", [(1,), (3,), (1023,), (4100,), (16, 33, 65), (16, 64, 64)], ids=str)
    @pytest.mark.parametrize(("latents_dtype", "velocity_dtype"), PAIRS)
    @pytest.mark.usefixtures("poisoned_memory")
    def test_step_log_prob_and_gradient(self, shape, latents_dtype, velocity_dtype) -> None:
        latents, velocity = torch.randn(2, 5, *shape).unbind()
        latents, velocity = latents.to(latents_dtype), velocity.to(velocity_dtype)
        next_latents, log_prob = on_gpu(latents, velocity)
        noise = gaussian(shape, seed=1234, sample_index=SAMPLES, step=STEPS, stream=1, iteration=6)
        expected, _ = sde_step_ref(latents, velocity, TABLE, STEPS, noise)
        tolerance = {FLOAT: 1e-6, HALF: 2e-3, BFLOAT: 1.6e-2}[latents_dtype]
        torch.testing.assert_close(next_latents.cpu(), expected, rtol=tolerance, atol=tolerance)
        double = [tensor.double().cpu() for tensor in (latents, velocity, next_latents)]
        rescored = sde_log_prob_ref(*double, TABLE, STEPS)
        error = (log_prob.cpu() - rescored).abs() / rescored.abs().clamp(min=1)
        assert error.max() < (2e-6 if latents[0].numel() > 1000 else 5e-4)

        leaf = velocity.cuda().requires_grad_()
        rescored = sde_log_prob(latents.cuda(), leaf, next_latents, TABLE.cuda(), STEPS.cuda(), implementation="cuda")
        assert torch.equal(rescored, log_prob)
        upstream = torch.randn(5)
        rescored.backward(upstream.cuda())
        gradient = sde_log_prob_grad_ref(upstream, latents, velocity, next_latents.cpu(), TABLE, STEPS)
        tolerance = {FLOAT: 1e-4, HALF: 2e-3, BFLOAT: 1.6e-2}[velocity_dtype]
        torch.testing.assert_close(leaf.grad.cpu(), gradient, rtol=tolerance, atol=tolerance * gradient.abs().max())

    def test_two_runs_and_misaligned_views_are_bit_equal(self) -> None:
        latents, velocity = torch.randn(2, 5 * 4096 + 1)[:, 1:].reshape(2, 5, 4096).unbind()
        packed = on_gpu(latents, velocity)
        views = [
            torch.cat([tensor.new_zeros(1), tensor.flatten()]).cuda()[1:].view(5, 4096)
            for tensor in (latents, velocity)
        ]
        for run in (on_gpu(latents, velocity), on_gpu(*views)):
            assert torch.equal(run[0], packed[0])
            assert torch.equal(run[1], packed[1])

    def test_it_follows_the_current_stream_and_can_be_captured(self) -> None:
        latents, velocity = torch.randn(2, 5, 16, 32, 32).cuda()
        table, steps, samples = TABLE.cuda(), STEPS.cuda(), SAMPLES.cuda()
        seed, iteration = torch.tensor([1234]).cuda(), torch.tensor([6]).cuda()

        def call() -> tuple[Tensor, Tensor]:
            options = {"seed": seed, "sample_index": samples, "iteration": iteration, "implementation": "cuda"}
            return sde_step(latents, velocity, table, steps, **options)

        first = [tensor.clone() for tensor in call()]
        iteration.fill_(7)
        second = [tensor.clone() for tensor in call()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for value, expected in ((6, first), (7, second)):
            iteration.fill_(value)
            graph.replay()
            assert torch.equal(captured[0], expected[0])
            assert torch.equal(captured[1], expected[1])

    def test_a_step_outside_the_table_makes_its_row_nan(self) -> None:
        latents, velocity = torch.randn(2, 5, 100).unbind()
        next_latents, log_prob = on_gpu(latents, velocity, STEPS + torch.tensor([0, 0, 1, 0, 0]))
        assert next_latents[2].isnan().all()
        assert log_prob.isnan().tolist() == [False, False, True, False, False]
        assert not next_latents[[0, 1, 3, 4]].isnan().any()
