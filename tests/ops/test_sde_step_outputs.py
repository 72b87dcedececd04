"""What a step may write beside its state: the model's input in half precision, and the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import sde_step, sde_step_outputs
from densegrpo_fast.flow.reference import guided_velocity_ref, sde_mean_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

TABLE = coefficients(sd3_sigmas(10), [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7], "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])
SCALE = torch.tensor([1.0, 4.5, 7.0, 0.0])
COUNTERS = {"seed": 1234, "sample_index": torch.tensor([3, 0, 70000, 5]), "iteration": 6}
STILL = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
"""A = 1 and no noise: the step leaves the state as it is."""

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("input_dtype", [None, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1,), (4099,), (4, 33, 65)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_they_go_with_the_state(implementation: str, guided: bool, input_dtype, shape: tuple[int, ...]) -> None:
    latents, velocity, uncond = torch.randn(3, 4, *shape)
    options = {"uncond": uncond, "guidance_scale": SCALE} if guided else {}
    options |= {**COUNTERS, "implementation": implementation}
    found = sde_step_outputs(latents, velocity, TABLE, STEPS, input_dtype=input_dtype, with_mean=True, **options)
    next_latents, log_prob = sde_step(latents, velocity, TABLE, STEPS, **options)
    assert torch.equal(found.next_latents, next_latents)
    assert torch.equal(found.log_prob, log_prob)
    if guided:
        velocity = guided_velocity_ref(velocity, uncond, SCALE)
    assert torch.equal(found.mean, sde_mean_ref(latents, velocity, TABLE, STEPS))
    assert torch.equal(found.mean[1], next_latents[1]), "a noise-free step reaches its mean"
    if input_dtype is None:
        assert found.model_input is None
    else:
        assert torch.equal(found.model_input, next_latents.to(input_dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_written_that_was_not_asked_for(implementation: str) -> None:
    latents, velocity = torch.randn(2, 4, 9)
    found = sde_step_outputs(latents, velocity, TABLE, STEPS, implementation=implementation, **COUNTERS)
    assert found.model_input is None
    assert found.mean is None


@needs_native
@pytest.mark.parametrize("variant", native.variants() if native.available() else [])
@pytest.mark.parametrize("input_dtype", HALVES, ids=str)
def test_compiled_casts_are_pytorchs_for_every_kind_of_number(input_dtype: torch.dtype, variant: str) -> None:
    # Every exponent and sign with mantissas around each place where a half is rounded, and the special numbers.
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor([0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper[:, None] | lower).flatten()
    values = torch.where(bits < 2**31, bits, bits - 2**32).int().view(torch.float32)[None]
    with native.using_variant(variant):
        counters = {"seed": 0, "sample_index": torch.zeros(1, dtype=torch.int64), "iteration": 0}
        options = {"input_dtype": input_dtype, "implementation": "cpu", **counters}
        found = sde_step_outputs(values, torch.zeros_like(values), STILL, 0, **options)
    # subnormal inputs may be flushed by the addition; compared is what the state became
    expected = found.next_latents.to(input_dtype)
    assert torch.equal(found.model_input.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(found.model_input[known].view(torch.int16), expected[known].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_storage(dtype: torch.dtype) -> None:
    latents, velocity = (tensor.to(dtype) for tensor in torch.randn(2, 4, 9, dtype=torch.float64))
    options = {"input_dtype": torch.bfloat16, "with_mean": True, **COUNTERS}
    found = sde_step_outputs(latents, velocity, TABLE, STEPS, **options)
    assert (found.next_latents.dtype, found.model_input.dtype) == (dtype, torch.bfloat16)
    assert found.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.model_input, found.next_latents.bfloat16())
    assert found.model_input.data_ptr() != found.next_latents.data_ptr()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_opcheck(implementation: str, guided: bool) -> None:
    latents, velocity, uncond = torch.randn(3, 4, 3, 5)
    guidance = (uncond, SCALE) if guided else (None, None)
    words = (STEPS, torch.tensor([5]), COUNTERS["sample_index"], torch.tensor([2]), 1)
    arguments = (latents, velocity, *guidance, TABLE, *words, torch.float16, True, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_one_node_of_a_compiled_graph(implementation: str) -> None:
    latents, velocity = torch.randn(2, 4, 3, 5)
    options = {"input_dtype": torch.bfloat16, "with_mean": True, "implementation": implementation}
    counters = {**COUNTERS, "seed": torch.tensor([5]), "iteration": torch.tensor([2])}

    def run(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(sde_step_outputs(2 * x, v, TABLE, STEPS, **options, **counters))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(latents, velocity), run(latents, velocity), strict=True):
        assert torch.equal(result, expected)


def test_fake_tensors_give_shapes_and_dtypes() -> None:
    with FakeTensorMode():
        index = torch.zeros(4, dtype=torch.int64)
        counters = {"seed": index[:1], "sample_index": index, "iteration": index[:1]}
        options = {"input_dtype": torch.float16, "with_mean": True, **counters}
        found = sde_step_outputs(torch.empty(4, 8), torch.empty(4, 8), torch.empty(10, 6), index, **options)
    assert [(part.dtype, tuple(part.shape)) for part in found] == [
        (torch.float32, (4, 8)),
        (torch.float32, (4,)),
        (torch.float16, (4, 8)),
        (torch.float32, (4, 8)),
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"input_dtype": torch.float32},
            ValueError,
            "input_dtype must be torch.float16, torch.bfloat16 or None, got",
        ),
        ({"velocity": torch.zeros(4, 7)}, ValueError, r"sde_step_outputs: velocity must have shape \[4, 8\] like"),
        ({"guidance_scale": 2.0}, ValueError, "sde_step_outputs: guidance_scale 2.0 needs uncond, got None"),
        (
            {"table": TABLE * torch.nan},
            ValueError,
            "table must be finite, got nan in column 0 of step 0",
        ),
        ({"implementation": "cuda"}, RuntimeError, "sde_step_outputs: implementation 'cuda' cannot serve this call"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    arguments = {"velocity": torch.zeros(4, 8), "table": TABLE, "with_mean": True, **COUNTERS, **options}
    with pytest.raises(error, match=message):
        sde_step_outputs(torch.zeros(4, 8), step_index=STEPS, **arguments)
