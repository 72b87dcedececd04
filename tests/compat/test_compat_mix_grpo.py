"""MixGRPO's functions against a float64 restatement of their formulas, and against its own float32 loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat.mix_grpo import (
    DPMState,
    dance_grpo_step,
    dance_step_function,
    dpm_step,
    dpm_step_function,
    flow_grpo_step,
    flow_step_function,
    philox_samples,
    run_sample_step,
    sampling_function,
)
from densegrpo_fast.flow.schedule import dance_sigmas

GRID = dance_sigmas(10)
WIDE = GRID.double()
STEPS = [0, 1, 5, 9]
FORMULAS = [{}, {"noise_level": 0.5}, {"sde_type": "cps"}, {"sde_type": "cps", "noise_level": 1.0}]


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The restated sampling utilities."""
    path = Path(__file__).parents[1] / "hosts" / "mix_sampling_utils.py"
    spec = importlib.util.spec_from_file_location("mix_sampling_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def close_log_prob(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert not (error > 1e-6).any()


@pytest.mark.parametrize("options", FORMULAS)
def test_flow_steps_are_the_formula(host: ModuleType, options: dict[str, Any]) -> None:
    x, v = torch.randn(2, 2, 64, 16)
    for index in STEPS:
        state = torch.get_rng_state()
        found = flow_grpo_step(v, x, 0.7, GRID, index, None, **options)
        torch.set_rng_state(state)
        noise = torch.randn(v.shape)
        wide = host.flow_grpo_step(v.double(), x.double(), 0.7, WIDE, index, found[0].double(), **options)
        close(found[0], wide[3] + wide[4] * noise)
        close(found[1], wide[1])
        close_log_prob(found[2], wide[2])
        close(found[3], wide[3])
        close(found[4], wide[4])
        assert [value.dtype for value in found] == [torch.float32] * 5 and found[4].shape == ()
        scored = flow_grpo_step(v, x, 0.7, GRID, index, found[0], **options)
        assert scored[0] is found[0]
        close_log_prob(scored[2], wide[2])
        state = torch.get_rng_state()
        along = flow_grpo_step(v, x, 0.7, GRID, index, None, determistic=True, **options)
        assert not torch.equal(torch.get_rng_state(), state)  # drawn and thrown away
        assert torch.equal(along[0], x + v * (GRID[index + 1] - GRID[index]))
        wide = host.flow_grpo_step(v.double(), x.double(), 0.7, WIDE, index, None, None, True, **options)
        torch.testing.assert_close(along[2].double(), wide[2], rtol=1e-5, atol=1e-5)


def test_published_values_of_the_flow_step() -> None:
    # SD3.5's grid, eta 0.7 (codebases' own function): at step 0 mean = 0.755 x - 0.03987068 v, injected std 0.7.
    from densegrpo_fast.flow.schedule import sd3_sigmas

    grid, one, zero = sd3_sigmas(10), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    for index, a, b, std in [
        (0, 0.755, -0.03987068, 0.7),
        (1, 0.71254101, -0.05824153, 0.74296407),
        (9, 0.99779279, -0.01111607, 0.00627809),
    ]:
        results = [flow_grpo_step(v, x, 0.7, grid, index, one) for x, v in ((one, zero), (zero, one))]
        assert [result[3][0, 0, 0].item() for result in results] == pytest.approx([a, b], rel=1e-6, abs=1e-8)
        assert results[0][4].item() == pytest.approx(std, rel=1e-6)
    for index, a, b, std in [(0, 0.33656696, -0.03987068, 0.91313726), (9, 1.0, -0.00892857, 0.0)]:
        results = [flow_grpo_step(v, x, 0.7, grid, index, one, sde_type="cps") for x, v in ((one, zero), (zero, one))]
        assert [result[3][0, 0, 0].item() for result in results] == pytest.approx([a, b], rel=1e-6, abs=1e-8)
        assert results[0][4].item() == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("options", FORMULAS)
@pytest.mark.parametrize("noisy", [True, False])
def test_dance_steps_are_the_formula(host: ModuleType, noisy: bool, options: dict[str, Any]) -> None:
    x, v = torch.randn(2, 2, 64, 16)
    for index in STEPS:
        state = torch.get_rng_state()
        found = dance_grpo_step(v, x, 0.3, GRID, index, None, True, noisy, **options)
        assert torch.equal(torch.get_rng_state(), state) != noisy
        mean, clean = host.dance_grpo_step(v.double(), x.double(), 0.3, WIDE, index, None, False, noisy, **options)
        close(found[1], clean)
        wide = host.dance_grpo_step(v.double(), x.double(), 0.3, WIDE, index, found[0].double(), True, noisy, **options)
        close_log_prob(found[2], wide[2])
        close(dance_grpo_step(v, x, 0.3, GRID, index, None, False, noisy, **options)[0], mean)
        if noisy:
            torch.set_rng_state(state)
            expected = host.dance_grpo_step(v, x, 0.3, GRID, index, None, True, True, **options)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=2e-6)
        else:
            close(found[0], mean)
        assert dance_grpo_step(v, x, 0.3, GRID, index, found[0], True, noisy, **options)[0] is found[0]


def test_nan_where_the_host_has_it(host: ModuleType) -> None:
    x, v = torch.randn(2, 2, 8, 4)
    calls = [
        lambda own: own.flow_grpo_step(v, x, 0.0, GRID, 3, None)[2],
        lambda own: own.flow_grpo_step(v, x, 0.0, GRID, 3, x)[2],
        lambda own: own.dance_grpo_step(v, x, 0.0, GRID, 3, None, True, True)[2],
        lambda own: own.dance_grpo_step(v, x, 0.0, GRID, 3, x, True, True)[2],
        lambda own: own.flow_grpo_step(v, x, 0.0, GRID, 3, x, sde_type="cps", noise_level=0.0)[2],
    ]
    own = SimpleNamespace(flow_grpo_step=flow_grpo_step, dance_grpo_step=dance_grpo_step)
    for call in calls:
        torch.testing.assert_close(call(own), call(host), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert calls[0](own).isnan().all() and (calls[3](own) == -math.inf).all()
    with pytest.raises(ValueError, match="eta must be positive"):
        dance_step_function("V1")(v, x, 0.0, GRID, 3, None, True, True)


def test_fixes_of_the_steps(host: ModuleType) -> None:
    x, v = torch.randn(2, 2, 64, 16)
    std = 0.3 * (GRID[3] - GRID[4]).sqrt()
    plain, fixed = (dance_step_function(constants=flag)(v, x, 0.3, GRID, 3, x, True, True)[2] for flag in (False, True))
    close_log_prob(fixed, plain.double() - std.double().log() - 0.5 * math.log(2 * math.pi))
    narrow = v.bfloat16()
    for options in FORMULAS:
        exact = flow_step_function(upcast=True)(narrow, x, 0.7, GRID, 3, x, **options)
        wide = host.flow_grpo_step(narrow.double(), x.double(), 0.7, WIDE, 3, x.double(), **options)
        close(exact[3], wide[3])
        assert (flow_grpo_step(narrow, x, 0.7, GRID, 3, x, **options)[3] - exact[3]).abs().max() > 1e-4


@pytest.mark.parametrize("options", FORMULAS)
def test_a_16_bit_velocity_is_rounded_where_the_host_rounds_it(host: ModuleType, options: dict[str, Any]) -> None:
    x, v = torch.randn(2, 2, 64, 16)
    v = v.bfloat16()
    for index in (1, 5):
        pairs = []
        for own in (SimpleNamespace(flow_grpo_step=flow_grpo_step, dance_grpo_step=dance_grpo_step), host):
            torch.manual_seed(2)
            results = [own.flow_grpo_step(v, x, 0.7, GRID, index, None, determistic=flag, **options) for flag in (0, 1)]
            results.append(own.dance_grpo_step(v, x, 0.3, GRID, index, None, True, True, **options))
            pairs.append([value for result in results for value in result])
        for found, expected in zip(*pairs, strict=True):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            # A product beside the middle of two 16-bit numbers may fall to the other one: a few elements at most.
            wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-5)
            assert wrong.float().mean() < 2e-3


def arguments(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "eta": 0.5,
            "shift": 3.0,
            "flow_grpo_sampling": True,
            "drop_last_sample": False,
            "sample_strategy": "progressive",
            "dpm_algorithm_type": "dpmsolver++",
            "dpm_solver_order": 2,
            "dpm_solver_type": "midpoint",
            "dpm_apply_strategy": "post",
            "dpm_post_compress_ratio": 0.4,
            **settings,
        }
    )


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "remembers"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("noisy", [False, True])
def test_solver_steps_are_the_formula(host: ModuleType, noisy: bool, order: int, remembers: bool, kind: str) -> None:
    args = arguments(dpm_solver_order=order, dpm_solver_type=kind)
    x, v, noise = torch.randn(3, 2, 64, 16)
    memories = [own.DPMState(order) if remembers else None for own in (SimpleNamespace(DPMState=DPMState), host)]
    found, expected = x, x.double()
    for index in range(10):
        options = {"sde_solver": noisy, "variance_noise": noise}
        mine = dpm_step(args, found.cos(), found, index, GRID[:-1], sigmas=GRID, dpm_state=memories[0], **options)
        options["variance_noise"] = noise.double()
        theirs = host.dpm_step(args, expected.cos(), expected, index, GRID[:-1], WIDE, memories[1], **options)
        torch.testing.assert_close(mine[0].double(), theirs[0], rtol=1e-6, atol=5e-6)
        torch.testing.assert_close(mine[1].double(), theirs[1], rtol=1e-6, atol=5e-6)
        torch.testing.assert_close(mine[2].double(), theirs[2], rtol=1e-4, atol=1e-4, equal_nan=True)
        found, expected = mine[0], theirs[0]
    assert mine[2].isnan().all()  # the step onto sigma 0 has no noise
    # The log_prob again, of one step from the same numbers.
    memory = [own.DPMState(order) for own in (SimpleNamespace(DPMState=DPMState), host)]
    for own, dtype in zip(memory, (torch.float32, torch.float64), strict=True):
        own.update(x.to(dtype))
        own.update_lower_order()
    mine = dpm_step(args, v, x, 4, GRID[:-1], GRID, memory[0], variance_noise=noise, sde_solver=noisy)
    wide = host.dpm_step(args, v.double(), x.double(), 4, GRID[:-1], WIDE, memory[1], None, noise.double(), noisy)
    close(mine[0], wide[0])
    # Mean and deviation of the SDE, under which any step is scored, from the states without noise and with ones.
    ends = []
    for drawn in (torch.zeros_like(noise), torch.ones_like(noise)):
        again = host.DPMState(order)
        again.update(x.double())
        again.update_lower_order()
        ends.append(
            host.dpm_step(args, v.double(), x.double(), 4, GRID[:-1], WIDE, again, None, drawn.double(), True)[0]
        )
    close_log_prob(mine[2], host.normal(mine[0].double(), ends[0], ends[1] - ends[0]))


def test_solver_draws_like_the_host_and_leaves_other_solvers_to_it(host: ModuleType) -> None:
    x, v = torch.randn(2, 2, 8, 4)
    args = arguments()
    for generator in (None, 5):
        results = []
        for own in (dpm_step, host.dpm_step):
            torch.manual_seed(3)
            source = None if generator is None else torch.Generator().manual_seed(generator)
            results.append(own(args, v, x, 2, GRID[:-1], GRID, None, source, None, True)[0])
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    philox = dpm_step_function(rng="philox", seed=1)
    with philox_samples(torch.arange(2), 0):
        state = torch.get_rng_state()
        drawn = [philox(args, v, x, 2, GRID[:-1], GRID, sde_solver=True) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state) and torch.equal(drawn[0][0], drawn[1][0])
    third = arguments(dpm_solver_order=3)
    with pytest.raises(ValueError, match="dpm_solver_order 1 or 2, got 'dpmsolver\\+\\+' with 3"):
        dpm_step(third, v, x, 2, GRID[:-1], GRID)
    asked: list[Any] = []
    other = dpm_step_function(host=lambda *given: asked.append(given) or ("theirs",))
    assert other(third, v, x, 2, GRID[:-1], GRID) == ("theirs",) and len(asked[0]) == 10


def test_gradients(host: ModuleType) -> None:
    x, v = torch.randn(2, 3, 64, 16)
    weights = torch.tensor([1.0, -2.0, 0.5])
    own = SimpleNamespace(flow_grpo_step=flow_grpo_step, dance_grpo_step=dance_grpo_step, dpm_step=dpm_step)
    prev = flow_grpo_step(v, x, 0.7, GRID, 4, None)[0]
    for name in ("flow", "cps", "dance", "dpm"):
        gradients = []
        for side, dtype in ((own, torch.float32), (host, torch.float64)):
            velocity, state, given, grid = (t.to(dtype) for t in (v, x, prev, GRID))
            velocity.requires_grad_()
            if name == "dance":
                result = side.dance_grpo_step(velocity, state, 0.3, grid, 4, given, True, True)
            elif name == "dpm":
                result = side.dpm_step(arguments(), velocity, state, 4, grid[:-1], grid, sde_solver=False)
            else:
                kind = {"sde_type": "cps"} if name == "cps" else {}
                result = side.flow_grpo_step(velocity, state, 0.7, grid, 4, given, **kind)
            loss = (result[2] * weights).sum() + result[1].square().mean()
            gradients.append(torch.autograd.grad(loss, velocity)[0].double())
        if name == "dpm":
            # The host's own state carries no gradient into its log_prob, nor does ours.
            assert torch.isfinite(gradients[0]).all()
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


class Transformer:
    """A velocity that depends on the state, the time and the conditioning; it counts its calls."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.times, self.training = dtype, [], True

    def eval(self) -> Transformer:
        self.training = False
        return self

    def __call__(self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **rest: Any) -> Any:
        assert not self.training and set(rest) == {
            "guidance",
            "txt_ids",
            "pooled_projections",
            "img_ids",
            "joint_attention_kwargs",
            "return_dict",
        }
        assert rest["guidance"].dtype == torch.bfloat16 and rest["txt_ids"].shape == (2 * 5, 3)
        self.times.append(timestep)
        x = hidden_states.float()
        return ((x + 0.5 * x.sin() + timestep[:, None, None] + encoder_hidden_states.mean()).to(self.dtype),)


def trajectory(run: Any, args: SimpleNamespace, flags: list[bool], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(6)
    z, embeddings = torch.randn(2, 16, 8).to(dtype), torch.randn(2, 5, 4)
    model = Transformer(dtype)
    ids = torch.zeros(2, 3)
    result = run(args, z, range(10), GRID, model, embeddings, embeddings[:, 0], ids, ids, True, flags)
    return *result, torch.stack(model.times), torch.get_rng_state()


WINDOW = [True] * 2 + [False] * 3 + [True] * 5


@pytest.mark.parametrize(
    "settings",
    [
        {"dpm_algorithm_type": "null"},
        {"dpm_algorithm_type": "null", "flow_grpo_sampling": False, "drop_last_sample": True},
        {"dpm_algorithm_type": "null", "sde_type": "cps", "noise_level": 0.6},
        {},
        {"dpm_solver_type": "heun", "flow_grpo_sampling": False, "sde_type": "cps"},
        {"dpm_apply_strategy": "all"},
    ],
)
def test_a_seeded_trajectory_is_the_hosts(host: ModuleType, settings: dict[str, Any]) -> None:
    args = arguments(**settings)
    found, expected = (trajectory(own.run_sample_step, args, WINDOW) for own in (SELF, host))
    for mine, theirs in zip(found[:3], expected[:3], strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(found[4], expected[4]) and torch.equal(found[5], expected[5])
    # With post: 5 steps up to the window's end, then int(6 * 0.4) = 2 points, so one step more.
    steps = 6 if args.dpm_algorithm_type != "null" and args.dpm_apply_strategy == "post" else 10
    assert found[2].shape == (2, steps + 1, 16, 8) and found[3].shape == (2, steps)


SELF = SimpleNamespace(run_sample_step=run_sample_step)


def test_a_16_bit_start_and_velocity(host: ModuleType) -> None:
    args = arguments(dpm_algorithm_type="null")
    found, expected = (trajectory(own.run_sample_step, args, WINDOW, torch.bfloat16) for own in (SELF, host))
    assert found[2].dtype == expected[2].dtype == torch.float32
    wrong = ~torch.isclose(found[2], expected[2], rtol=1e-4, atol=1e-4)
    assert wrong.float().mean() < 0.02


def functions(version: str) -> tuple[Any, ...]:
    return flow_step_function(version), dance_step_function(version), dpm_step


def test_fixes_of_the_sampling() -> None:
    late = [True] * 7 + [False] + [True] * 2
    # After step 7 there remain 10 - 7 = 3 points, and int(3 * 0.4) = 1 of them is no step: the end is not at sigma 0.
    plain = trajectory(run_sample_step, arguments(), late)
    fixed = trajectory(sampling_function("V2", *functions("V2"), reach_zero=True), arguments(), late)
    assert plain[2].shape[1] == 9 and fixed[2].shape[1] == 10
    assert torch.equal(plain[2], fixed[2][:, :9])
    args = arguments(dpm_apply_strategy="all")
    fixed = trajectory(sampling_function("V2", *functions("V2"), independent_noise=True), args, [False] * 10)
    plain = trajectory(run_sample_step, args, [False] * 10)
    again = trajectory(run_sample_step, args, [False] * 10)
    assert torch.equal(plain[2], again[2]) and not torch.equal(plain[2], fixed[2])


def test_v1_knows_no_sde_type() -> None:
    args = arguments(dpm_algorithm_type="null", sde_type="cps")
    plain = arguments(dpm_algorithm_type="null")
    assert torch.equal(
        trajectory(sampling_function("V1", *functions("V1")), args, WINDOW)[2],
        trajectory(run_sample_step, plain, WINDOW)[2],
    )
    x = torch.zeros(1, 2, 2)
    with pytest.raises(TypeError):
        flow_step_function("V1")(x, x, 0.7, GRID, 1, None, sde_type="cps")


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"dpm_algorithm_type": "ddim"}, WINDOW, "dpm_algorithm_type must be null or a dpmsolver, got 'ddim'"),
        ({"dpm_apply_strategy": "some"}, WINDOW, "dpm_apply_strategy must be all or post, got 'some'"),
        ({"sample_strategy": "random"}, WINDOW, 'needs sample_strategy progressive, got "random"'),
        ({}, [True] * 10, "needs a noisy step to come after"),
        ({"dpm_algorithm_type": "null", "sde_type": "ode"}, WINDOW, "sde_type must be one of sde, cps, got 'ode'"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], flags: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory(run_sample_step, arguments(**settings), flags)


def test_wrong_calls() -> None:
    x = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="not both"):
        flow_grpo_step(x, x, 0.7, GRID, 1, x, torch.Generator())
    with pytest.raises(ValueError, match="grpo_sample must be true"):
        run_sample_step(arguments(), x, range(1), GRID, None, x, x, x, x, False, [True])
    for make in (flow_step_function, dance_step_function):
        with pytest.raises(ValueError, match="version must be one of V1, V2, got 'V3'"):
            make("V3")
