"""What the emulator notices: faults of every kind, planted into the PTX that Triton makes of the step's kernels."""

from __future__ import annotations

import pytest
import torch
from planted import Planted
from torch import Tensor

pytest.importorskip("triton")

from emulator.errors import (  # noqa: E402
    BadLaunch,
    Divergence,
    Fault,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    Unsupported,
)
from emulator.on_triton import on_cpu  # noqa: E402

from densegrpo_fast.flow.dynamics import coefficients  # noqa: E402
from densegrpo_fast.flow.schedule import sd3_sigmas  # noqa: E402
from densegrpo_fast.kernels.sde_log_prob import sde_log_prob  # noqa: E402
from densegrpo_fast.kernels.sde_step import sde_step  # noqa: E402

STEP, SECOND = "sde_step_kernel", "log_prob_kernel"
GUARDED_SHUFFLE = r"^(\s*)(shfl\.sync\.bfly\.b32[^;]*, )(\d+)(, 31, -1;)"

FAULTS = [
    # memory: bounds
    Planted("no mask on loads", STEP, r"@%p\d+ (ld\.global\.(?:v4\.)?b32 \{ %r\d+)", r"\1", OutOfBounds),
    Planted("no mask on stores", STEP, r"@%p\d+ (st\.global\.v4)", r"\1", OutOfBounds),
    Planted("<= for < in a mask", STEP, r"setp\.lt\.s32 (\s*%p\d+, %r\d+, %r\d+)", r"setp.le.s32 \1", OutOfBounds),
    Planted("16 bytes too early", STEP, r"(ld\.global\.v4.*) \+ 0 \]", r"\1 + -16 ]", OutOfBounds, 1),
    Planted("the seed of the next launch", STEP, r"(ld\.global\.b64.*) \+ 0 \]", r"\1 + 8 ]", OutOfBounds, -1),
    Planted("past shared memory", STEP, r"\[global_smem\]", "[global_smem+16]", OutOfBounds),
    # memory: alignment
    Planted("a vector off 16 bytes", STEP, r"(ld\.global\.v4.*) \+ 0 \]", r"\1 + 4 ]", Misaligned, 1),
    Planted("a scalar off 4 bytes", STEP, r"(st\.global\.b32.*) \+ 0 \]", r"\1 + 2 ]", Misaligned),
    Planted("shared memory off 4 bytes", STEP, r"(st\.shared\.b32 .*) \+ 0 \]", r"\1 + 2 ]", Misaligned, 1),
    # races
    Planted("no barrier before the warps' sums are read", STEP, r"bar\.sync\s+0;", "", Race, 1),
    Planted("no barrier before the block's sum is read", STEP, r"bar\.sync\s+0;", "", Race, -1),
    Planted("all threads store the block's sum", STEP, r"@%p\d+ (st\.global\.b32)", r"\1", Race),
    Planted("all rows are row 0", STEP, r"%ctaid\.x;", "%ctaid.z;", Race),
    Planted("all blocks of a row are its first", STEP, r"%ctaid\.y;", "%ctaid.z;", Race),
    Planted("a result over what others load", STEP, r"(st\.global\.v4\.b32) \[[^]]*\]", r"\1 [ %rd7 + -16 ]", Race, 1),
    Planted("every lane stores its warp's sum", STEP, r"@%p\d+ (st\.shared)", r"\1", Race, 1),
    # barriers and shuffles
    Planted("a barrier for some threads", STEP, r"(bar\.sync\s+0;)", r"@%p7 \1", Divergence, 1),
    Planted("an early return before a barrier", STEP, r"(bar\.sync\s+0;)", r"@%p7 ret; \1", Divergence, 1),
    Planted("a shuffle for some lanes", STEP, GUARDED_SHUFFLE, r"\1@%p36 \2\3\4", Divergence, -1),
    Planted("a mask of half a warp", STEP, r", 31, -1;", ", 31, 65535;", Divergence, 1),
    Planted("a loop without an end", SECOND, r"add\.s32 (\s*)(%r\d+), \2, 128;", "", Divergence),
    # first use
    Planted("a product that nobody computes", STEP, r"mul\.rn\.f32[^;]*;", "", Uninitialised, 1),
    Planted("a warp keeps its sum for itself", STEP, r"@%p\d+ st\.shared[^;]*;", "", Uninitialised, 1),
    Planted("a block keeps its sum for itself", STEP, r"@%p\d+ st\.global\.b32[^;]*;", "", Uninitialised),
    # launches
    Planted("compiled for other blocks", STEP, r"\.reqntid 128", ".reqntid 64", BadLaunch),
    Planted("an unknown instruction", STEP, r"add\.rn\.f32", "add.rz.f32", Unsupported, 1),
    # right accesses, wrong numbers
    Planted("a shuffle of another distance", STEP, r", 8, 31, -1;", ", 4, 31, -1;", None, 1),
    Planted(
        "a product fused into a sum",
        STEP,
        r"add\.rn\.f32 (\s*%r\d+, )(%r\d+), ",
        r"fma.rn.f32 \1\2, 0f3F800001, ",
        None,
        1,
    ),
    Planted(
        "a round of the noise left out", STEP, r"xor\.b32 (\s*%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;", None, 1
    ),
    Planted("the sign of a log-probability", SECOND, r"sub\.rn\.f32", "add.rn.f32", None, 1),
]


def inputs() -> tuple[Tensor, ...]:
    """Two rows, of three blocks each, that end within the last one."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 2, 4112, generator=generator)
    return latents, velocity


def run(error: str = "none", capability: int = 90, edit=None) -> tuple[Tensor, Tensor]:
    """State and log-probability of a step."""
    table, one = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table, torch.tensor([3])
    latents, velocity = inputs()
    with on_cpu(capability, error, edit):
        arguments = (table, torch.tensor([1, 4]), one, torch.arange(2), one, 1)
        return sde_step(latents, velocity, None, None, *arguments)[:2]


@pytest.fixture(scope="module")
def right() -> tuple[Tensor, Tensor]:
    return run()


@pytest.mark.ci
@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_it_is_noticed(right, planted: Planted) -> None:
    if planted.noticed is not None:
        with pytest.raises(Fault) as caught:
            run(edit=planted.edit)
        assert caught.type is planted.noticed
        assert "_kernel" in str(caught.value)
    else:
        wrong = run(edit=planted.edit)
        assert not all(torch.equal(one, other) for one, other in zip(wrong, right, strict=True))


@pytest.mark.parametrize("error", ["low", "high", "mixed"])
def test_results_may_not_hang_on_the_last_bit_of_an_approximation(right, error: str) -> None:
    state, log_prob = run(error)
    # the radius of the noise is an approximate root
    assert not torch.equal(state, right[0])
    torch.testing.assert_close(state, right[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_prob, right[1], rtol=1e-6, atol=1e-6)


def test_a_view_ends_before_its_storage() -> None:
    # A kernel that reads past a view reads its neighbour: no fault for a GPU, but one for the emulator.
    table, (latents, velocity) = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table, inputs()
    steps = torch.tensor([1, 4])
    longer = torch.zeros(3, 4112)
    longer[:2] = latents
    later = Planted(
        "a row too late", "sde_log_prob_kernel", r"(ld\.global\.v4.*) \+ 0 \]", r"\1 + 16448 ]", OutOfBounds, 1
    )
    with on_cpu(90, edit=later.edit), pytest.raises(OutOfBounds, match="latents_ptr"):
        sde_log_prob(longer[:2], velocity, None, None, None, None, longer[:2], table, steps, 2)
