"""Graphed runner against those computed as they are.

Every test of `GraphedStepRunner` runs on the CPU with a tape that has a CUDA graph's semantics (the operations are
recorded once; a replay repeats them on the same memory, and no Python runs), and with `-m gpu` with real CUDA graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import BranchedRollout, branch_rollout
from densegrpo_fast.sampling.graphs import Capturer, CudaCapturer, GraphedStepRunner, Graphs
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout

T = 4
PROMPTS = ["a cat", "a cat", "a photo of the moon"]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


class Tape(TorchDispatchMode):
    """Records operations; `play` repeats them on the tensors of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = operation(*args, **(kwargs or {}))
        # addresses, not Python objects, are what a graph keeps: `parameter.data = other` must not reach it
        kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        self.operations.append((operation, *kept, found))
        return found

    @torch.no_grad()
    def play(self) -> None:
        for operation, args, kwargs, recorded in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                # views and in-place operations lie in the recording's memory already
                if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeCapturer:
    """`Capturer` for the CPU."""

    def __init__(self) -> None:
        self.captures = self.releases = 0

    def why_not(self, device: torch.device) -> str:
        return ""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        tape = Tape()
        with tape:
            outputs = function()
        self.captures += 1
        for output in outputs:
            if output is not None:
                # capturing computes nothing on a GPU
                output.fill_(float("nan"))
        return tape.play, outputs

    def release(self) -> None:
        self.releases += 1


@dataclass
class Setting:
    """Where the tests run, and how they capture."""

    device: torch.device
    capturer: Capturer
    tiny: Callable[..., Any]

    def policy(self) -> Any:
        """A tiny SD3 with an adapter that matters."""
        model = self.tiny(spread=0.3)
        model.pipeline.to(self.device)
        model.device = self.device
        return model

    def close(self, found: Tensor, expected: Tensor) -> None:
        """The same operations; padded to other sizes, or in a graph, libraries may choose other kernels."""
        tolerance = 1e-5 if self.device.type == "cpu" else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def setting(request: pytest.FixtureRequest, tiny_policy: Callable[..., FlowModel]) -> Setting:
    capturer = TapeCapturer() if request.param == "cpu" else CudaCapturer()
    return Setting(torch.device(request.param), capturer, tiny_policy)


def sampled(
    model: Any, iteration: int = 0, prompts: list[str] = PROMPTS, scale: float = 1.0, **options: Any
) -> Trajectory:
    index = torch.arange(len(prompts), device=model.device)
    table = coefficients(model.sigmas(T), 0.7, "flow_sde").to(model.device)
    noise, conditioning = initial_noise(model, index, seed=0, iteration=iteration), model.encode(prompts)
    counters = {"sample_index": index, "seed": 0, "iteration": iteration}
    return rollout(model, noise, conditioning, table, **counters, guidance_scale=scale, **options)


def grown(model: Any, iteration: int = 0, scale: float = 1.0) -> BranchedRollout:
    """Two trunks with three branches at each of the steps 0 and 2."""
    index = torch.arange(0, 6, 3, device=model.device)
    return branch_rollout(
        model,
        initial_noise(model, index, seed=0, iteration=iteration),
        model.encode(["a cat"] * 3 + ["a photo of the moon"] * 3),
        coefficients(model.sigmas(T), 0.7, "flow_sde").only((0, 2)).to(model.device),
        branches=3,
        sample_index=index,
        seed=0,
        iteration=iteration,
        guidance_scale=scale,
    )


@torch.no_grad()
def move(model: Any, name: str = ".lora_") -> None:
    """Change weights in place, as an optimiser does."""
    for key, parameter in model.network.named_parameters():
        if name in key:
            parameter.add_(0.1 * torch.randn(parameter.shape, device="cpu").to(parameter))


@pytest.mark.ci
@pytest.mark.parametrize(("scale", "guidance"), [(1.0, "full"), (3.0, "full"), (3.0, "reuse")])
def test_a_replay_is_the_computation(setting: Setting, scale: float, guidance: Any) -> None:
    model, plan = setting.policy(), plans.exact(T)
    runner = GraphedStepRunner(setting.capturer)
    # node 1 has 3 rows, node 2 has 6, node 3 has 9: chunks of 4 make graphs of 3, 4 and 1 rows, and 2 are padded to 3
    graphed = Lookahead(model, plan, guidance=guidance, chunk=4, step_runner=runner)
    eager = Lookahead(model, plan, guidance=guidance, chunk=4)
    for iteration, prompts in enumerate((PROMPTS, PROMPTS[::-1], ["the moon", "a cat", "a cat"])):
        trajectory = sampled(model, iteration, prompts, scale, keep_guidance=True)
        setting.close(graphed.complete(trajectory), eager.complete(trajectory))
        assert len(runner.graphs) == 3


@pytest.mark.ci
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_branches_are_completed_by_the_same_graphs(setting: Setting, scale: float) -> None:
    model = setting.policy()
    runner = Counted(setting.capturer)
    graphed = Lookahead(model, plans.exact(T), chunk=4, step_runner=runner)
    eager = Lookahead(model, plans.exact(T), chunk=4)
    forwards, velocity = [], model.velocity
    model.velocity = lambda *arguments: forwards.append(len(arguments[0])) or velocity(*arguments)
    for iteration in range(2):
        tree = grown(model, iteration, scale)
        # two trunks, as far as state 2
        assert forwards == [2] * 3
        runner.rows.clear()
        found = graphed.complete(tree)
        # the 6 branches of step 0 and the 6 of step 2 arrive at the states 1 and 3; the former go on by 2 and 3
        assert runner.rows == [4, 2] * 4
        setting.close(found, eager.complete(tree))
        # one graph with a jump and one without, both of four rows
        assert len(runner.graphs) == 2
        forwards.clear()


class Counted(GraphedStepRunner):
    """Graphed runner that note how many rows each had."""

    def __init__(self, capturer: Capturer):
        super().__init__(capturer)
        self.rows: list[int] = []

    def __call__(self, model: Any, rows: Any, step_index: int, scale: float, **options: Any) -> Any:
        self.rows.append(len(rows))
        return super().__call__(model, rows, step_index, scale, **options)


def test_weights_that_change_in_place_are_seen(setting: Setting) -> None:
    model = setting.policy()
    runner = GraphedStepRunner(setting.capturer)
    graphed, eager = Lookahead(model, plans.nodes(T, [2]), step_runner=runner), Lookahead(model, plans.nodes(T, [2]))
    trajectory = sampled(model)
    before = graphed.complete(trajectory)
    move(model)
    after = graphed.complete(trajectory)
    assert (after - before)[:2].abs().max() > 1e-3
    setting.close(after, eager.complete(trajectory))
    assert len(runner.graphs) == 1


def test_weights_that_move_to_another_address_are_seen(setting: Setting) -> None:
    model = setting.policy()
    runner = GraphedStepRunner(setting.capturer)
    graphed, eager = Lookahead(model, plans.nodes(T, [2]), step_runner=runner), Lookahead(model, plans.nodes(T, [2]))
    trajectory = sampled(model)
    before = graphed.complete(trajectory)
    for parameter in model.trainable_parameters().values():
        parameter.data = parameter.data + 0.2
    after = graphed.complete(trajectory)
    assert (after - before)[:2].abs().max() > 1e-3
    setting.close(after, eager.complete(trajectory))
    assert len(runner.graphs) == 1


def test_policy_and_reference_have_graphs_of_their_own(setting: Setting) -> None:
    model = setting.policy()
    runner = GraphedStepRunner(setting.capturer)
    graphed, eager = Lookahead(model, plans.nodes(T, [2]), step_runner=runner), Lookahead(model, plans.nodes(T, [2]))
    trajectory = sampled(model)
    policy = graphed.complete(trajectory)
    with model.reference():
        reference = graphed.complete(trajectory)
        setting.close(reference, eager.complete(trajectory))
        assert len(runner.graphs) == 2
    assert (reference - policy)[:2].abs().max() > 1e-3
    setting.close(graphed.complete(trajectory), policy)
    assert len(runner.graphs) == 2


def test_a_copy_is_followed(setting: Setting) -> None:
    model = setting.policy()
    copy = LookaheadCopy(model)
    runner = GraphedStepRunner(setting.capturer)
    graphed, policy = Lookahead(copy, plans.nodes(T, [2]), step_runner=runner), Lookahead(model, plans.nodes(T, [2]))
    trajectory = sampled(model)
    for _ in range(2):
        copy.refresh()
        torch.testing.assert_close(graphed.complete(trajectory), policy.complete(trajectory), rtol=1e-4, atol=1e-4)
        move(model)
    assert len(runner.graphs) == 1 and copy.mode == "copy" and model.mode == "policy"


def test_features_of_the_latest_rollout_are_taken_over(setting: Setting) -> None:
    model, plan = setting.policy(), plans.nodes(T, [2, 3])
    cache = FeatureCache(model.network, nodes=plan.nodes(), rows=len(PROMPTS))
    runner = GraphedStepRunner(setting.capturer)
    graphed = Lookahead(model, plan, chunk=4, cache=cache, step_runner=runner)
    eager = Lookahead(model, plan, chunk=4, cache=cache)
    found = []
    for iteration in range(2):
        trajectory = sampled(model, iteration, cache=cache)
        found.append(graphed.complete(trajectory))
        setting.close(found[-1], eager.complete(trajectory))
        plain = Lookahead(model, plan).complete(trajectory)
        assert (found[-1] - plain)[:2].abs().max() > 1e-5
    # node 2: 4 rows, and 2 padded; node 3: 4 + 4 + 1 rows; each node reads features of its own
    assert len(runner.graphs) == 3


def test_gradients_are_refused(setting: Setting) -> None:
    model = setting.policy()
    lookahead = Lookahead(model, plans.nodes(T, [2]), step_runner=GraphedStepRunner(setting.capturer))
    trajectory = sampled(model)
    standing = lookahead.evaluate(trajectory)
    with pytest.raises(RuntimeError, match="captured without gradients"):
        lookahead.advance({0: standing[0]}, 3, trajectory)


def test_a_model_that_asks_the_device_runs_without_graphs(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    model = setting.policy()
    forward = model._forward
    model._forward = lambda latents, *rest: forward(latents, *rest) * (1.0 if latents.sum().item() > 0 else 2.0)
    graphed = Lookahead(model, plans.exact(T), step_runner=GraphedStepRunner(setting.capturer))
    trajectory = sampled(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            setting.close(graphed.complete(trajectory), Lookahead(model, plans.exact(T)).complete(trajectory))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "lookahead.graphs: the evaluation cannot be captured" in message and "runs without graphs" in message


@pytest.mark.ci
def test_memory_that_runs_out_in_a_capture_costs_rows_and_not_graphs(
    tiny_policy: Callable[..., FlowModel], caplog: pytest.LogCaptureFixture
) -> None:
    class Small(TapeCapturer):
        def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
            play, outputs = super().capture(function)
            if len(outputs.velocity) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return play, outputs

    model, capturer = tiny_policy(spread=0.3), Small()
    runner = GraphedStepRunner(capturer)
    graphed = Lookahead(model, plans.exact(T), chunk=4, step_runner=runner)
    trajectory = sampled(model)
    with caplog.at_level(logging.WARNING):
        found = graphed.complete(trajectory)
    torch.testing.assert_close(found, Lookahead(model, plans.exact(T)).complete(trajectory), rtol=1e-5, atol=1e-5)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "going on with 2" in message
    # what was captured before gives its memory back
    assert capturer.releases == 1 and len(runner.graphs) == 1


def test_a_capture_bears_with_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: modes.append(options) or nullcontext())
    for name in ("current_stream", "Stream", "CUDAGraph", "graph_pool_handle", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    CudaCapturer().capture(lambda: (torch.zeros(1),))
    assert [mode["capture_error_mode"] for mode in modes] == ["thread_local"]


def test_without_a_gpu_the_lookahead_runs_as_it_is(mixture_model: FlowModel, caplog: pytest.LogCaptureFixture) -> None:
    trajectory = sampled(mixture_model, prompts=["0", "12"])
    graphed = Lookahead(mixture_model, plans.exact(T), step_runner=GraphedStepRunner())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = graphed.complete(trajectory)
    assert torch.equal(found, Lookahead(mixture_model, plans.exact(T)).complete(trajectory))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("lookahead.graphs: CUDA graphs need a CUDA device, the model is on cpu")


def test_a_run_with_graphs_on_a_cpu_is_refused(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert train(tmp_path / "run", **{"lookahead.graphs": "true"}) == 2
    assert "lookahead.graphs: CUDA graphs need a CUDA device, the model is on cpu; set it to" in capsys.readouterr().err


def add(static: Mapping[str, Tensor]) -> tuple[Tensor]:
    return (static["x"] + static["c"],)


def test_buffers_are_shared_and_graphs_found_by_key_and_shape() -> None:
    capturer = TapeCapturer()
    graphs = Graphs(capturer)
    x, c = torch.tensor([1.0, 2.0]), torch.tensor([10.0])
    (first,) = graphs.run("a", add, {"x": x}, {"c": c})
    assert first.tolist() == [11, 12]
    (again,) = graphs.run("a", add, {"x": x + 5}, {"c": c})
    # the graph's own tensor: what was returned before is overwritten
    assert again is first and first.tolist() == [16, 17]
    assert graphs.run("b", add, {"x": x}, {"c": c})[0].tolist() == [11, 12]
    assert graphs.run("a", add, {"x": torch.ones(3)}, {"c": c})[0].tolist() == [11, 11, 11]
    assert graphs.run("a", add, {"x": x.double()}, {"c": c})[0].dtype == torch.float64
    assert len(graphs) == capturer.captures == 4
    graphs.forget()
    assert (len(graphs), capturer.releases) == (0, 1)
    assert graphs.run("a", add, {"x": x}, {"c": c})[0].tolist() == [11, 12]


def test_constants_are_copied_when_they_have_changed() -> None:
    graphs = Graphs(TapeCapturer())
    x, c = torch.zeros(1), torch.tensor([1.0])

    def total(constant: Tensor) -> float:
        return graphs.run("key", add, {"x": x}, {"c": constant})[0].item()

    assert total(c) == 1
    # a write that torch is not told of: what counts as the same tensor, unchanged, is not copied again
    c.data.fill_(7.0)
    assert total(c) == 1
    c.add_(1)
    assert total(c) == 8
    assert total(torch.tensor([3.0])) == 3
    assert total(c) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_nothing_waits_for_the_gpu(tiny_policy: Callable[..., FlowModel]) -> None:
    setting = Setting(torch.device("cuda"), CudaCapturer(), tiny_policy)
    model = setting.policy()
    options = {"guidance_scale": 3.0, "sample_index": torch.arange(3, device="cuda"), "seed": 0, "iteration": 0}
    noise = initial_noise(model, options["sample_index"], seed=0, iteration=0)
    conditioning, table = model.encode(PROMPTS), coefficients(model.sigmas(T), 0.7, "flow_sde").to("cuda")
    graphed = Lookahead(model, plans.exact(T), chunk=4, step_runner=GraphedStepRunner(setting.capturer))

    def along() -> Tensor:
        trajectory = rollout(model, noise, conditioning, table, **options)
        graphed.complete(trajectory)
        return graphed.complete(replace(trajectory, latents=trajectory.latents.clone()))

    def branching() -> Tensor:
        tree = branch_rollout(
            model, noise[:1], conditioning, table.only((0, 2)), branches=3, **options | {"sample_index": first}
        )
        graphed.complete(tree.evaluated(graphed).twigs)
        return graphed.complete(tree)

    first = options["sample_index"][:1]
    for run in (along, branching):
        expected = run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        setting.close(found, expected)
