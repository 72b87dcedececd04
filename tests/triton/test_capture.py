"""On a GPU only: no synchronisation in a step, and CUDA graphs whose replays follow the tensors they were given."""

from __future__ import annotations

import pytest
import torch

from densegrpo_fast.flow.ops import euler_jump, grpo_loss, sde_log_prob_kl, sde_step, sde_step_outputs

pytestmark = pytest.mark.gpu


def test_a_replayed_step_draws_new_noise(device, batch) -> None:
    latents, velocity = torch.randn(2, 5, 16, 32, 32, device=device)
    seed, iteration = torch.tensor([3], device=device), torch.tensor([0], device=device)
    steps, samples = batch.steps.clone(), batch.samples.clone()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        counters = {"seed": seed, "sample_index": samples, "iteration": iteration, "implementation": "triton"}
        return sde_step(latents, velocity, batch.table, steps, **counters)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for turn in range(3):
        seed.fill_(3 + turn)
        iteration.fill_(turn)
        steps.copy_(batch.steps.roll(turn))
        samples.copy_(batch.samples.roll(turn))
        latents.normal_()
        graph.replay()
        for replayed, expected in zip(captured, run(), strict=True):
            assert torch.equal(replayed, expected)


def test_a_replayed_update_follows_its_inputs(device, batch) -> None:
    latents, velocity, reference = torch.randn(3, 5, 16, 32, 32, device=device)
    counters = {"seed": 3, "sample_index": batch.samples, "iteration": 0, "implementation": "triton"}
    next_latents, old = sde_step(latents, velocity, batch.table, batch.steps, **counters)
    advantages, leaf = torch.randn(5, device=device), velocity.clone().requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        transition = (next_latents, batch.table, batch.steps)
        log_prob, kl = sde_log_prob_kl(latents, leaf, reference, *transition, implementation="triton")
        options = {"clip_range": 0.2, "kl_coef": 0.1, "implementation": "triton"}
        loss, metrics = grpo_loss(log_prob, old, advantages, kl, **options)
        return loss.detach(), metrics, *torch.autograd.grad(loss, leaf)

    # as PyTorch asks of what is to be captured with a backward pass: first on a stream of its own
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(2):
        advantages.normal_()
        with torch.no_grad():
            leaf.add_(1e-3 * torch.randn_like(leaf))
        graph.replay()
        for replayed, expected in zip(captured, run(), strict=True):
            assert torch.equal(replayed, expected)


def test_nothing_waits_for_the_device(device, batch) -> None:
    latents, velocity, uncond = torch.randn(3, 5, 16, 32, 32, device=device)
    leaf = velocity.clone().requires_grad_()
    counters = {"seed": 3, "sample_index": batch.samples, "iteration": 0, "implementation": "triton"}
    sigma, next_sigma = batch.sigmas[batch.steps], batch.sigmas[batch.steps + 1]

    def iteration() -> None:
        guidance = {"uncond": uncond, "guidance_scale": 4.5}
        next_latents, old = sde_step(latents, velocity, batch.table, batch.steps, **guidance, **counters)
        more = {"input_dtype": torch.bfloat16, "with_mean": True}
        sde_step_outputs(latents, velocity, batch.table, batch.steps, **more, **counters)
        euler_jump(latents, velocity, sigma, next_sigma, implementation="triton")
        transition = (next_latents, batch.table, batch.steps)
        guidance |= {"reference_uncond": uncond, "implementation": "triton"}
        log_prob, kl = sde_log_prob_kl(latents, leaf, velocity, *transition, **guidance)
        options = {"clip_range": 1e-4, "kl_coef": 0.1, "implementation": "triton"}
        grpo_loss(log_prob, old, torch.ones_like(old), kl, **options)[0].backward()

    iteration()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_is_triton(device, batch) -> None:
    latents, velocity = torch.randn(2, 5, 4096, device=device)
    counters = {"seed": 3, "sample_index": batch.samples, "iteration": 0}
    chosen = sde_step(latents, velocity, batch.table, batch.steps, **counters)
    named = sde_step(latents, velocity, batch.table, batch.steps, implementation="triton", **counters)
    assert torch.equal(chosen[0], named[0])
