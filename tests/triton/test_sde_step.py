from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import dynamics
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref, sde_step_ref
from densegrpo_fast.kernels import _affine

SHAPES = [(1,), (3,), (2048,), (5, 7, 9), (4, 33, 65), (33, 64)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def states(device: torch.device, *shape: int, dtypes=DTYPES[0]) -> tuple[Tensor, Tensor]:
    latents, velocity = torch.randn(2, 5, *shape)
    return latents.to(device, dtypes[0]), velocity.to(device, dtypes[1])


def step(batch, latents: Tensor, velocity: Tensor, **options) -> tuple[Tensor, Tensor]:
    options = {
        "table": batch.table,
        "step_index": batch.steps,
        "seed": 1234,
        "sample_index": batch.samples,
        "iteration": 6,
        "implementation": "triton",
        **options,
    }
    return sde_step(latents, velocity, options.pop("table"), options.pop("step_index"), **options)


def test_columns_are_those_of_the_table() -> None:
    assert _affine.COLUMN_A.value == dynamics.A
    assert _affine.COLUMN_B.value == dynamics.B
    assert _affine.COLUMN_C.value == dynamics.C
    assert _affine.COLUMN_LOG_PROB_SCALE.value == dynamics.LOG_PROB_SCALE
    assert _affine.COLUMN_LOG_PROB_CONST.value == dynamics.LOG_PROB_CONST
    assert _affine.NUM_COLUMNS.value == dynamics.NUM_COLUMNS


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_step_against_float64(device, batch, storage_error, shape: tuple[int, ...], dtypes) -> None:
    latents, velocity = states(device, *shape, dtypes=dtypes)
    next_latents, log_prob = step(batch, latents, velocity)
    assert next_latents.dtype == latents.dtype
    assert log_prob.dtype == torch.float32
    noise = gaussian(
        shape, seed=1234, sample_index=batch.samples, step=batch.steps, stream=Stream.STEP, iteration=6
    ).double()
    double = (latents.double(), velocity.double())
    expected, _ = sde_step_ref(*double, batch.table, batch.steps, noise)
    torch.testing.assert_close(next_latents.double(), expected, rtol=storage_error[dtypes[0]], atol=1e-6)
    # Residuals are known to one float32 rounding of the state and are divided by C, .034 at least in these rows: on
    # single elements this shows, over a sample it averages out.
    rescored = sde_log_prob_ref(*double, next_latents.double(), batch.table, batch.steps)
    error = (log_prob - rescored).abs() / rescored.abs().clamp(min=1)
    assert error.max() < (1e-6 if latents[0].numel() > 1000 else 1e-4)


@pytest.mark.ci
@pytest.mark.capabilities(80, 100)
@pytest.mark.parametrize("elements", [1, 6, 2048, 2051])
def test_noise_equals_the_layout(device, batch, elements: int) -> None:
    # A = B = 0 and C = 1 turn the step into the bare noise.
    table = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5, 0.0]], device=device)
    zeros = torch.zeros(5, elements, device=device)
    options = {"seed": (7 << 33) + 1, "iteration": 2**32 - 1, "stream": int(Stream.BRANCH0)}
    drawn, _ = step(batch, zeros, zeros, table=table, step_index=0, **options)
    expected = gaussian((elements,), sample_index=batch.samples, step=0, **options)
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.ci
@pytest.mark.capabilities(80, 100)
def test_noise_free_rows_are_euler_bit_for_bit(device, batch) -> None:
    latents, velocity = states(device, 16, 8, 8)
    next_latents, log_prob = step(batch, latents, velocity)
    for row in (1, 4):
        dt = batch.sigmas[batch.steps[row] + 1] - batch.sigmas[batch.steps[row]]
        assert torch.equal(next_latents[row], latents[row] + dt * velocity[row])
        assert log_prob[row] == 0


@pytest.mark.parametrize("family", ["cps", "dance", "precise", "wan"])
def test_every_family(device, batch, family: str) -> None:
    latents, velocity = states(device, 3, 11, 31)
    table = dynamics.coefficients(batch.sigmas.cpu(), 0.7, family).table.to(device)
    actual = step(batch, latents, velocity, table=table)
    expected = step(batch, latents, velocity, table=table, implementation="reference")
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    error = (actual[1] - expected[1]).abs() / expected[1].abs().clamp(min=1)
    assert error.max() < 2e-6


@pytest.mark.capabilities(80, 100)
def test_rescoring_gives_the_same_log_prob(device, batch) -> None:
    latents, velocity = states(device, 3, 37, 41)
    next_latents, log_prob = step(batch, latents, velocity)
    rescored = sde_log_prob(latents, velocity, next_latents, batch.table, batch.steps, implementation="triton")
    assert ((rescored - log_prob).exp() - 1).abs().max() <= 1e-6


def test_a_row_does_not_depend_on_its_batch(device, batch) -> None:
    latents, velocity = states(device, 3, 29, 41)
    whole = step(batch, latents, velocity)
    order = torch.tensor([4, 0, 3, 1, 2], device=device)
    for part in (order[:1], order[1:]):
        indices = {"step_index": batch.steps[part], "sample_index": batch.samples[part]}
        rows = step(batch, latents[part], velocity[part], **indices)
        assert torch.equal(rows[0], whole[0][part])
        assert torch.equal(rows[1], whole[1][part])


def test_large_batch_is_the_small_one_repeated(device, batch) -> None:
    latents, velocity = (tensor.repeat(13, 1)[:64] for tensor in states(device, 21))
    indices = {
        name: value.repeat(13)[:64] for name, value in (("step_index", batch.steps), ("sample_index", batch.samples))
    }
    rows = step(batch, latents, velocity, **indices)
    single = step(batch, latents[:5], velocity[:5])
    assert torch.equal(rows[0][60:64], single[0][:4])
    assert torch.equal(rows[1][55:60], single[1])


def test_two_runs_are_bit_equal(device, batch) -> None:
    inputs = states(device, 3, 29, 41)
    for first, second in zip(step(batch, *inputs), step(batch, *inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.capabilities(80, 100)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs(device, batch) -> None:
    latents, velocity = (tensor.transpose(1, 3) for tensor in states(device, 6, 5, 4))
    samples = torch.stack([batch.samples, batch.samples], dim=1)[:, 0]
    steps = torch.stack([batch.steps, batch.steps], dim=1)[:, 0]
    next_latents, log_prob = step(batch, latents, velocity, sample_index=samples, step_index=steps)
    expected = step(batch, latents.contiguous(), velocity.contiguous())
    assert next_latents.is_contiguous()
    assert torch.equal(next_latents, expected[0])
    assert torch.equal(log_prob, expected[1])


def test_integer_and_tensor_arguments_agree(device, batch) -> None:
    inputs = states(device, 9)
    integers = step(batch, *inputs, step_index=3, seed=99, iteration=2)
    counters = {"seed": torch.tensor([99], device=device), "iteration": torch.tensor(2, device=device)}
    tensors = step(batch, *inputs, step_index=torch.full((5,), 3, device=device), **counters)
    assert torch.equal(integers[0], tensors[0])
    assert torch.equal(integers[1], tensors[1])


@pytest.mark.capabilities(80, 100)
def test_a_bad_row_stays_alone(device, batch) -> None:
    latents, velocity = states(device, 700)
    expected = step(batch, latents, velocity)
    latents[3, 5] = torch.nan
    steps = batch.steps.clone()
    steps[0] = 10  # beyond the table: nothing can be raised on a device, so the row says it
    steps[2] = -1
    next_latents, log_prob = step(batch, latents, velocity, step_index=steps)
    assert next_latents[[0, 2]].isnan().all()
    assert log_prob.isnan().tolist() == [True, False, True, True, False]
    assert next_latents[3].isnan().sum() == 1
    assert torch.equal(next_latents[[1, 4]], expected[0][[1, 4]])


def test_empty_batch(device, batch) -> None:
    nothing = torch.zeros(0, 4, device=device)
    indices = {"step_index": batch.steps[:0], "sample_index": batch.samples[:0]}
    next_latents, log_prob = step(batch, nothing, nothing, **indices)
    assert (next_latents.shape, log_prob.shape) == ((0, 4), (0,))


def test_float64_is_refused(device, batch) -> None:
    latents, velocity = states(device, 4)
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: it computes in float32, got torch.float6"):
        step(batch, latents, velocity.double())


def test_opcheck(device, batch) -> None:
    latents, velocity = states(device, 3, 4)
    seed, iteration = (torch.tensor([value], device=device) for value in (5, 2))
    counters = (seed, batch.samples, iteration, 1)
    arguments = (latents, velocity, None, None, batch.table, batch.steps, *counters, None, False, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, arguments)


def test_under_torch_compile(device, batch) -> None:
    inputs = states(device, 3, 4)
    compiled = torch.compile(lambda x, v: step(batch, x, v), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), step(batch, *inputs), strict=True):
        assert torch.equal(actual, expected)
