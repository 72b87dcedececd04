"""Fewer rows per forward when memory runs out: the same gradient, the same run, and an end with advice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.training.learner import Learner, LearnerOptions

Policy = Callable[..., DiffusersModel]
Options = Callable[..., LearnerOptions]
T, B = 2, 4


@contextmanager
def small_memory(model: DiffusersModel, rows: int, *, backward: bool = False) -> Iterator[list[int]]:
    """Within the context the network runs out of memory with more rows: at its last block's end, or on the way back.

    Yields:
        Rows of the forwards that were asked for.
    """
    asked: list[int] = []

    def run_out(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (as a test has it)")

    def entered(_: Any, args: Any, kwargs: Any) -> None:
        asked.append(len(kwargs["hidden_states"]))

    def left(_: Any, args: Any, output: tuple[Tensor]) -> None:
        if len(output[0]) <= rows:
            return
        if not backward:
            run_out(output[0])
        elif output[0].requires_grad:
            # after the last block's gradients, before the first one's
            first.register_hook(run_out)

    def inside(_: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        nonlocal first
        first = output[1]

    first = torch.empty(0)
    network = model.network
    handles = [
        network.register_forward_pre_hook(entered, with_kwargs=True),
        network.register_forward_hook(left),
        network.transformer_blocks[0].register_forward_hook(inside),
    ]
    try:
        yield asked
    finally:
        for handle in handles:
            handle.remove()


def sampled(model: DiffusersModel) -> Trajectory:
    index = torch.arange(B)
    return rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(["a cat", "a cat", "the moon", "the moon"]),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=2.0,
    )


def updated(
    model: DiffusersModel, trajectory: Trajectory, options: LearnerOptions
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """First moments, which are 0.1 times the gradient, and the metrics of an update."""
    learner = Learner(model, options)
    judged = torch.tensor([1.0, -0.5, 0.3, 2.0])[:, None].repeat(1, T)
    metrics = learner.update(trajectory, judged, steps=[0, 1])
    moments = {name: t for name, t in learner.tensors()["optimizer"].items() if name.endswith("exp_avg")}
    return moments, metrics


@pytest.mark.ci
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_update_in_smaller_parts_has_the_same_gradient(
    tiny_policy: Policy, learner_options: Options, caplog: pytest.LogCaptureFixture, rows: int, backward: bool
) -> None:
    options = learner_options(kl_coef=0.1)
    trajectory = sampled(tiny_policy(spread=0.1))
    expected, plain = updated(tiny_policy(spread=0.1), trajectory, options)
    model = tiny_policy(spread=0.1)
    with small_memory(model, rows, backward=backward) as asked, caplog.at_level(logging.WARNING):
        found, metrics = updated(model, trajectory, options)
    assert max(asked) == B and asked[-1] == rows
    scale = max(moment.abs().max().item() for moment in expected.values())
    for name, moment in found.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-4 * scale)
    for name in ("loss", "kl", "grad_norm", "clip_fraction"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6)
    assert (plain["micro_batch"], metrics["micro_batch"]) == (B, rows)
    assert caplog.text.count("the memory ran out") == {2: 1, 1: 2}[rows]
    assert "4 rows per forward (sampler.micro_batch); going on with 2" in caplog.text


@pytest.mark.ci
def test_one_row_that_does_not_fit_ends_with_advice(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    trajectory = sampled(model)
    before = {name: parameter.clone() for name, parameter in model.trainable_parameters().items()}
    with small_memory(model, 0), pytest.raises(UserError, match="with one row per forward .*checkpointing") as caught:
        updated(model, trajectory, learner_options())
    assert exit_code_of(caught.value) == ExitCode.ENVIRONMENT
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.trainable_parameters().items())


def test_the_rows_are_part_of_the_learner_s_state(tiny_policy: Policy, learner_options: Options) -> None:
    learner = Learner(tiny_policy(), learner_options())
    learner.rows.lower()
    other = Learner(tiny_policy(), learner_options())
    other.restore(learner.tensors(), learner.state())
    assert other.rows.rows == 2


@pytest.mark.parametrize(("before", "after"), [(8, 4), (6, 3), (9, 3), (7, 1), (2, 1), (1155, 385)])
def test_rows_go_down_to_a_divisor(before: int, after: int) -> None:
    budget = OomBackoff(before, "sampler.micro_batch")
    budget.lower()
    assert budget.rows == after


def test_pieces_cover_all_rows_once() -> None:
    budget, done = OomBackoff(4, "rows"), []

    def work(rows: slice) -> int:
        if rows.stop - rows.start > 2 and rows.start >= 4:
            raise torch.OutOfMemoryError("too many")
        done.append((rows.start, rows.stop))
        return rows.stop - rows.start

    assert list(budget.each(slice(0, 11), work)) == [4, 2, 2, 2, 1]
    assert done == [(0, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    assert budget.fitting(lambda rows: rows) == 2
    # any other error passes
    with pytest.raises(ValueError):
        budget.fitting(lambda rows: int("x"))
    assert budget.rows == 2


@pytest.mark.ci
def test_a_run_goes_on_with_fewer_rows_in_rollout_and_update_alike(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from densegrpo_fast.run_files.metrics import read_metrics

    rows = []
    original = DiffusersModel._forward

    def forward(self: DiffusersModel, latents: Tensor, *rest: Tensor) -> Tensor:
        if len(latents) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("too many")
        rows.append((len(latents), torch.is_grad_enabled()))
        return original(self, latents, *rest)

    settings = {"optimizer.updates_per_iteration": 1, "run.iterations": 2, "run.memory_check": "off"}
    settings |= {"lookahead.chunk": 7, "evaluation.every": 0}
    assert train(tmp_path / "plain", **settings) == 0
    monkeypatch.setattr(DiffusersModel, "_forward", forward)
    assert train(tmp_path / "small", **settings) == 0
    plain, small = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "small"))
    assert caplog.text.count("the memory ran out") == 1
    for one, two in zip(plain, small, strict=True):
        assert (one["micro_batch"], two["micro_batch"]) == (2, 1)
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
    # from the second rollout on, rollout and update have one row each: the ratio of the first update is 1 again
    assert small[1]["first_ratio_deviation"] <= 1e-6
    assert (1, True) in rows and (2, True) not in rows and (1, False) in rows


@pytest.mark.ci
def test_the_monitor_and_its_decodes_go_on_with_fewer_rows(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from densegrpo_fast.run_files.metrics import read_metrics

    forward, decode = DiffusersModel._forward, DiffusersModel.decode

    def narrow(original: Any, rows: int) -> Any:
        def limited(self: DiffusersModel, latents: Tensor, *rest: Any) -> Tensor:
            if len(latents) > rows:
                raise torch.OutOfMemoryError("too many")
            return original(self, latents, *rest)

        return limited

    # rollout and update have 2 rows per forward, the monitor at first 6: one group of 2 in each of three states
    settings = {"sampler.num_steps": 4, "lookahead.chunk": 6, "lookahead.monitor_every": 1, "run.memory_check": "off"}
    settings |= {"lookahead.plan": "one_step", "run.iterations": 1, "evaluation.every": 0}
    settings |= {"objective.trained_steps": "all_but_last"}
    assert train(tmp_path / "plain", **settings) == 0
    monkeypatch.setattr(DiffusersModel, "_forward", narrow(forward, 2))
    monkeypatch.setattr(DiffusersModel, "decode", narrow(decode, 3))
    assert train(tmp_path / "small", **settings) == 0
    (plain,), (small,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "small"))
    assert "of the lookahead monitor)" in caplog.text and "of full decodes)" in caplog.text
    agreement = "monitor/spearman_rewards"
    assert small[agreement] == plain[agreement]
