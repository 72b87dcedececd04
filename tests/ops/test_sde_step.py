from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.flow.ops import sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref, sde_step_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

SIGMAS = sd3_sigmas(10)
# Steps 2 and 7 are noise-free, so every batch below mixes SDE and ODE rows.
LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(SIGMAS, LEVELS, "flow_sde").table
STEPS = torch.tensor([0, 2, 9, 4, 7])
SAMPLES = torch.tensor([3, 0, 70000, 5, 9])

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]


def states(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    latents, velocity = torch.randn(2, 5, *shape)
    return latents.to(dtype), velocity.to(dtype)


def step(latents: Tensor, velocity: Tensor, implementation: str = "reference", **options) -> tuple[Tensor, Tensor]:
    options = {
        "table": TABLE,
        "step_index": STEPS,
        "seed": 1234,
        "sample_index": SAMPLES,
        "iteration": 6,
        "implementation": implementation,
        **options,
    }
    return sde_step(latents, velocity, options.pop("table"), options.pop("step_index"), **options)


@needs_native
@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (1021,), (4096,), (33, 65), (4, 33, 65), (16, 32, 32)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_compiled_step_equals_the_reference(shape: tuple[int, ...]) -> None:
    latents, velocity = states(*shape)
    next_latents, log_prob = step(latents, velocity, "cpu")
    expected_latents, expected_log_prob = step(latents, velocity, "reference")
    torch.testing.assert_close(next_latents, expected_latents, rtol=1e-6, atol=1e-6)
    # The deviation from the mean is known to one rounding of the state, about 1e-7, and is divided by C,
    # which is .006 in the terminal step. On single elements this shows; it averages out over a sample.
    tolerance = 1e-6 if latents[0].numel() > 1000 else 5e-4
    torch.testing.assert_close(log_prob, expected_log_prob, rtol=tolerance, atol=tolerance)


@needs_native
def test_compiled_step_does_not_depend_on_the_number_of_threads() -> None:
    latents, velocity = states(16, 64, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(step(latents, velocity, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for next_latents, log_prob in results[1:]:
        assert torch.equal(next_latents, results[0][0])
        assert torch.equal(log_prob, results[0][1])


@needs_native
@pytest.mark.parametrize("tail", [(0, 3), (1, 7)])
def test_compiled_noise_equals_the_layout(tail: tuple[int, int]) -> None:
    # A = B = 0 and C = 1 turn the step into the bare noise.
    table = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5, 0.0]])
    zeros = torch.zeros(5, 4096 * 3 + tail[1])
    drawn, _ = step(zeros, zeros, "cpu", table=table, step_index=0, seed=(7 << 33) + tail[0], stream=Stream.BRANCH0)
    expected = gaussian(
        zeros.shape[1:],
        seed=(7 << 33) + tail[0],
        sample_index=SAMPLES,
        step=0,
        stream=Stream.BRANCH0,
        iteration=6,
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_noise_free_rows_are_euler_bit_for_bit(implementation: str) -> None:
    latents, velocity = states(16, 8, 8)
    next_latents, log_prob = step(latents, velocity, implementation)
    for row in (1, 4):
        dt = SIGMAS[STEPS[row] + 1] - SIGMAS[STEPS[row]]
        assert torch.equal(next_latents[row], latents[row] + dt * velocity[row])
        assert log_prob[row] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_batch(implementation: str) -> None:
    latents, velocity = states(3, 17, 5)
    whole = step(latents, velocity, implementation)
    order = torch.tensor([4, 0, 3, 1, 2])
    for part in (order[:2], order[2:]):
        rows = step(latents[part], velocity[part], implementation, step_index=STEPS[part], sample_index=SAMPLES[part])
        assert torch.equal(rows[0], whole[0][part])
        assert implementation != "cpu" or torch.equal(rows[1], whole[1][part])
        torch.testing.assert_close(rows[1], whole[1][part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 64])
def test_batches_of_any_size(implementation: str, batch: int) -> None:
    latents, velocity = torch.randn(2, batch, 4, 9, 7)
    steps, samples = torch.arange(batch) % len(TABLE), 1000 + torch.arange(batch)
    options = {"step_index": steps, "sample_index": samples}
    next_latents, log_prob = step(latents, velocity, implementation, **options)
    again = step(latents, velocity, implementation, **options)
    assert torch.equal(next_latents, again[0])
    assert torch.equal(log_prob, again[1])
    noise = gaussian((4, 9, 7), seed=1234, sample_index=samples, step=steps, stream=Stream.STEP, iteration=6)
    expected, _ = sde_step_ref(latents.double(), velocity.double(), TABLE, steps, noise.double())
    torch.testing.assert_close(next_latents.double(), expected, rtol=1e-6, atol=1e-6)
    assert (log_prob == 0).nonzero().flatten().tolist() == [i for i in range(batch) if i % 10 in (2, 7)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["flow_sde", "cps", "dance", "precise", "wan"])
def test_every_family_against_float64(implementation: str, family: str) -> None:
    latents, velocity = states(16, 16, 16)
    table = coefficients(SIGMAS, 0.7, family).table
    next_latents, log_prob = step(latents, velocity, implementation, table=table)
    noise = gaussian((16, 16, 16), seed=1234, sample_index=SAMPLES, step=STEPS, stream=Stream.STEP, iteration=6)
    double = [tensor.double() for tensor in (latents, velocity)]
    expected_latents, _ = sde_step_ref(*double, table, STEPS, noise.double())
    expected_log_prob = sde_log_prob_ref(*double, next_latents.double(), table, STEPS)
    torch.testing.assert_close(next_latents.double(), expected_latents, rtol=1e-6, atol=1e-6)
    error = (log_prob - expected_log_prob).abs() / expected_log_prob.abs().clamp(min=1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("velocity_dtype", [torch.float32, torch.bfloat16])
def test_log_prob_is_that_of_the_rounded_state(dtype: torch.dtype, velocity_dtype: torch.dtype) -> None:
    latents, velocity = states(4, 8, 8, dtype=dtype)
    velocity = velocity.to(velocity_dtype)
    next_latents, log_prob = step(latents, velocity, "auto")
    assert next_latents.dtype == dtype
    assert log_prob.dtype == torch.float32
    rescored = sde_log_prob_ref(latents.double(), velocity.double(), next_latents.double(), TABLE, STEPS)
    torch.testing.assert_close(log_prob.double(), rescored, rtol=1e-5, atol=1e-5)
    exact = step(latents.float(), velocity.float(), "auto")[0]
    assert torch.equal(next_latents, exact.to(dtype))


def test_float64_is_computed_in_float64() -> None:
    latents, velocity = states(7, dtype=torch.float64)
    next_latents, log_prob = step(latents, velocity, "auto")
    assert next_latents.dtype == log_prob.dtype == torch.float64
    noise = gaussian((7,), seed=1234, sample_index=SAMPLES, step=STEPS, stream=Stream.STEP, iteration=6).double()
    row = TABLE[4].double()
    torch.testing.assert_close(
        next_latents[3],
        row[0] * latents[3] + row[1] * velocity[3] + row[2] * noise[3],
        rtol=1e-14,
        atol=1e-14,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs(implementation: str) -> None:
    latents, velocity = (tensor.transpose(1, 3) for tensor in states(6, 5, 4))
    next_latents, log_prob = step(latents, velocity, implementation)
    expected = step(latents.contiguous(), velocity.contiguous(), implementation)
    assert next_latents.is_contiguous()
    assert torch.equal(next_latents, expected[0])
    torch.testing.assert_close(log_prob, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integer_and_tensor_arguments_agree(implementation: str) -> None:
    latents, velocity = states(9)
    integers = step(latents, velocity, implementation, step_index=3, seed=99, iteration=2)
    tensors = step(
        latents,
        velocity,
        implementation,
        step_index=torch.full((5,), 3),
        seed=torch.tensor([99]),
        iteration=torch.tensor(2),
    )
    assert torch.equal(integers[0], tensors[0])
    assert torch.equal(integers[1], tensors[1])


def test_fake_tensors_give_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        latents = torch.empty(5, 4, 8, 8, dtype=torch.bfloat16)
        next_latents, log_prob = sde_step(
            latents,
            latents.float(),
            torch.empty(10, 6),
            torch.zeros(5, dtype=torch.int64),
            seed=torch.zeros(1, dtype=torch.int64),
            sample_index=torch.zeros(5, dtype=torch.int64),
            iteration=torch.zeros(1, dtype=torch.int64),
        )
    assert (next_latents.shape, next_latents.dtype) == ((5, 4, 8, 8), torch.bfloat16)
    assert (log_prob.shape, log_prob.dtype) == ((5,), torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    latents, velocity = states(3, 4)
    seed, iteration = torch.tensor([5]), torch.tensor([2])
    counters = (seed, SAMPLES, iteration, int(Stream.STEP))
    arguments = (latents, velocity, None, None, TABLE, STEPS, *counters, None, False, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_one_node_of_a_compiled_graph(implementation: str) -> None:
    latents, velocity = states(3, 7)
    seed, iteration = torch.tensor([5]), torch.tensor([2])

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return step(2 * x, v, implementation, seed=seed, iteration=iteration)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(latents, velocity), run(latents, velocity), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"velocity": torch.zeros(5, 4, 7)},
            ValueError,
            r"velocity must have shape \[5, 4, 8\] like latents, got",
        ),
        (
            {"velocity": torch.zeros(5, 4, 8).int()},
            TypeError,
            "velocity must be float32, float16, bfloat16 or",
        ),
        ({"latents": torch.zeros(5)}, ValueError, r"latents must have shape \[B, ...\]"),
        ({"velocity": torch.zeros(5, 4, 8, device="meta")}, ValueError, "velocity must be on cpu, got meta"),
        ({"table": TABLE[:, :5]}, ValueError, r"table must have shape \[T, 6\], got \[10, 5\]"),
        ({"table": TABLE.double()}, TypeError, "table must be float32"),
        ({"table": TABLE.where(TABLE != TABLE[3, 2], torch.nan)}, ValueError, "got nan in column 2 of step 3"),
        ({"table": TABLE.to("meta")}, ValueError, "table must be on cpu, got meta"),
        ({"sample_index": SAMPLES.float()}, TypeError, "sample_index must be int64, got torch.float32"),
        ({"iteration": 2**32}, ValueError, r"iteration must be in \[0, 2\^32\), got 4294967296"),
        ({"step_index": 1.0}, TypeError, "step_index must be an int or an int64 tensor, got float"),
        ({"implementation": "cuda"}, RuntimeError, "sde_step: implementation 'cuda' cannot serve this call"),
        ({"implementation": "triton"}, RuntimeError, "sde_step: implementation 'triton' cannot serve this call"),
        ({"step_index": STEPS[:4]}, ValueError, r"step_index must have shape \[5\], got \[4\]"),
        ({"step_index": STEPS.int()}, TypeError, "step_index must be int64"),
        ({"step_index": -1}, ValueError, "step_index must be in"),
        ({"sample_index": SAMPLES[:3]}, ValueError, r"sample_index must have shape \[5\], got \[3\]"),
        ({"seed": -3}, ValueError, "seed must be in"),
        ({"stream": -1}, ValueError, "stream must be in"),
        ({"implementation": "fast"}, ValueError, "implementation must be one of auto, reference, cpu"),
        ({"step_index": 10}, ValueError, r"sde_step: step_index must be in \[0, 10\), got 10 in row 0"),
        ({"step_index": STEPS - 1}, ValueError, r"sde_step: step_index must be in \[0, 10\), got -1 in row 0"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    inputs = {"latents": torch.zeros(5, 4, 8), "velocity": torch.zeros(5, 4, 8), **options}
    with pytest.raises(error, match=message):
        step(**inputs)
