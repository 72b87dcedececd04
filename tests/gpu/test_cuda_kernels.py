"""The kernels of csrc/*.cu: on a GPU with `-m gpu`, else nvcc's PTX and host code in the emulator, where there is nvcc.

Faults planted into that PTX have to be noticed, as those in Triton's (test_planted_faults.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from emulator import on_cuda
from emulator.errors import BadLaunch, Divergence, Fault, Misaligned, OutOfBounds, Race, Uninitialised
from planted import Planted
from torch import Tensor

from densegrpo_fast.flow import native_cuda
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.noise import gaussian
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_grad_ref, sde_log_prob_ref, sde_step_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

pytestmark = pytest.mark.ci

HAS_GPU = torch.cuda.is_available()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(bool(native_cuda.why_not()), reason=native_cuda.why_not())]
EMULATED = pytest.mark.skipif(HAS_GPU or on_cuda.find_nvcc() is None, reason="there is a GPU, or no nvcc")
PLACES = [pytest.param("cuda", marks=ON_GPU), *(pytest.param(f"sm_{n}", marks=EMULATED) for n in (90, 80))]

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(FLOAT, FLOAT), (FLOAT, HALF), (FLOAT, BFLOAT), (HALF, HALF), (BFLOAT, BFLOAT)]
STEPS, SAMPLES = torch.tensor([0, 2, 9, 4, 7]), torch.tensor([3, 0, 70000, 2**32 - 1, 9])
LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(sd3_sigmas(10), LEVELS, "flow_sde").table

Builds = Callable[[int], on_cuda.Build]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """The library for a capability, compiled once."""
    return cache(lambda capability: on_cuda.build(tmp_path_factory.mktemp("cuda"), capability))


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, builds: Builds) -> Iterator[torch.device]:
    """Where the kernels run."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with on_cuda.on_cpu(builds(int(request.param[3:]))):
        yield torch.device("cpu")


def run(latents: Tensor, velocity: Tensor, device: torch.device, steps: Tensor = STEPS) -> tuple[Tensor, Tensor]:
    """A step of five rows on a device."""
    return sde_step(
        latents.to(device),
        velocity.to(device),
        TABLE.to(device),
        steps.to(device),
        seed=1234,
        sample_index=SAMPLES.to(device),
        iteration=6,
        implementation="cuda",
    )


@pytest.mark.parametrize("shape", [(1,), (1023,), (4100,), (3, 33, 64)], ids=str)
@pytest.mark.parametrize(("latents_dtype", "velocity_dtype"), PAIRS)
@pytest.mark.usefixtures("poisoned_memory")
def test_step_log_prob_and_gradient(device, shape, latents_dtype, velocity_dtype) -> None:
    latents, velocity = torch.randn(2, 5, *shape).unbind()
    latents, velocity = latents.to(latents_dtype), velocity.to(velocity_dtype)
    next_latents, log_prob = run(latents, velocity, device)
    noise = gaussian(shape, seed=1234, sample_index=SAMPLES, step=STEPS, stream=1, iteration=6)
    expected, _ = sde_step_ref(latents, velocity, TABLE, STEPS, noise)
    tolerance = {FLOAT: 1e-6, HALF: 2e-3, BFLOAT: 1.6e-2}[latents_dtype]
    torch.testing.assert_close(next_latents.cpu(), expected, rtol=tolerance, atol=tolerance)
    double = [tensor.double().cpu() for tensor in (latents, velocity, next_latents)]
    rescored = sde_log_prob_ref(*double, TABLE, STEPS)
    error = (log_prob.cpu() - rescored).abs() / rescored.abs().clamp(min=1)
    assert error.max() < (2e-6 if latents[0].numel() > 1000 else 5e-4)

    leaf, transition = velocity.to(device).requires_grad_(), (next_latents, TABLE.to(device), STEPS.to(device))
    rescored = sde_log_prob(latents.to(device), leaf, *transition, implementation="cuda")
    assert torch.equal(rescored, log_prob)
    upstream = torch.randn(5)
    rescored.backward(upstream.to(device))
    gradient = sde_log_prob_grad_ref(upstream, latents, velocity, next_latents.cpu(), TABLE, STEPS)
    tolerance = {FLOAT: 1e-4, HALF: 2e-3, BFLOAT: 1.6e-2}[velocity_dtype]
    torch.testing.assert_close(leaf.grad.cpu(), gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))


def test_two_runs_and_misaligned_views_are_bit_equal(device) -> None:
    latents, velocity = torch.randn(2, 5 * 4096 + 1)[:, 1:].reshape(2, 5, 4096).unbind()
    first = run(latents, velocity, device)
    views = [
        torch.cat([tensor.new_zeros(1), tensor.flatten()]).to(device)[1:].view(5, 4096)
        for tensor in (latents, velocity)
    ]
    for again in (run(latents, velocity, device), run(*views, device)):
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_a_step_outside_the_table_makes_its_row_nan(device, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a GPU nothing waits for the steps to be read
    monkeypatch.setattr("densegrpo_fast.flow.checks.check_steps", lambda *_: None)
    latents, velocity = torch.randn(2, 5, 100).unbind()
    next_latents, log_prob = run(latents, velocity, device, STEPS + torch.tensor([0, 0, 1, 0, 0]))
    assert next_latents[2].isnan().all()
    assert log_prob.isnan().tolist() == [False, False, True, False, False]
    assert not next_latents[[0, 1, 3, 4]].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(bool(native_cuda.why_not()), reason=native_cuda.why_not())
def test_it_follows_the_current_stream_and_can_be_captured() -> None:
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


@EMULATED
def test_what_has_no_noise_is_the_reference_s_to_the_bit(builds: Builds) -> None:
    # What remains is contraction and approximate operations, and both are in the noise and in the sums alone.
    latents, velocity = torch.randn(2, 5, 4099)
    steps = torch.tensor([2, 7, 2, 7, 2])
    upstream, results = torch.randn(5), []
    with on_cuda.on_cpu(builds(90), "none"):
        for implementation in ("cuda", "reference"):
            leaf = velocity.clone().requires_grad_()
            counters = {"seed": 1, "sample_index": SAMPLES, "iteration": 0}
            state, _ = sde_step(latents, velocity, TABLE, steps, **counters, implementation=implementation)
            noisy = latents + 0.1 * velocity
            sde_log_prob(latents, leaf, noisy, TABLE, STEPS, implementation=implementation).backward(upstream)
            results.append((state, leaf.grad))
    (state, gradient), (expected, expected_gradient) = results
    assert torch.equal(state, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=3e-7, atol=0)


@EMULATED
def test_a_device_that_is_not_there_harms_one_call_alone(builds: Builds) -> None:
    latents = torch.randn(1, 8)
    pointers = [tensor.data_ptr() for tensor in (latents, latents, latents, TABLE, STEPS)]
    partial, log_prob = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    with on_cuda.on_cpu(builds(90)) as library:
        arguments = (0, 0, *pointers, len(TABLE), 1, 8, partial.data_ptr(), log_prob.data_ptr())
        assert library.densegrpo_cuda_sde_log_prob(1, None, *arguments) == 101
        assert library.densegrpo_cuda_error(101) == b"invalid device ordinal"
        # types that are not compiled
        assert library.densegrpo_cuda_sde_log_prob(0, None, 1, 2, *arguments[2:]) == 1
        # the first error is not reported again
        scored = sde_log_prob(latents, latents, latents, TABLE, STEPS[:1], implementation="cuda")
    assert scored.isfinite().all()


SANITIZED = """
import sys
from pathlib import Path
import torch
import test_cuda_kernels as tests

built = tests.on_cuda.load(Path(sys.argv[1]))
for elements in (1, 4096, 4099):
    for latents_dtype, velocity_dtype in tests.PAIRS:
        latents, velocity = torch.randn(2, 5, elements)
        with tests.on_cuda.on_cpu(built):
            tests.run(latents.to(latents_dtype), velocity.to(velocity_dtype), torch.device("cpu"))
"""


@EMULATED
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is preloaded")
def test_host_code_under_sanitizers(tmp_path: Path) -> None:
    on_cuda.build(tmp_path, 90, "-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    ask = ["g++", "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "LD_PRELOAD": sanitizer,
        # Python itself leaks at its end
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join((str(here), str(here.parent.parent))),
    }
    command = [sys.executable, "-c", SANITIZED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


STEP, FINISH = "sde_step_kernelILb1EffEE", "finish_log_prob"

FAULTS = [
    Planted("a vector off 16 bytes", STEP, r"(ld\.global\.nc\.v4\.u32 .*\[%rd\d+)\]", r"\1+4]", Misaligned, 1),
    Planted("a row too far", STEP, r"(st\.global\.v4\.u32 \[%rd\d+)\]", r"\1+16448]", OutOfBounds, 1),
    Planted("no barrier", STEP, r"bar\.sync\s+0;", "", Race, 1),
    Planted(
        "a barrier for a warp's first lane",
        STEP,
        r"(bar\.sync\s+0;)",
        r"setp.eq.s32 %p1, %tid.x, 0; @%p1 \1",
        Divergence,
        1,
    ),
    Planted("warps keep their sums", STEP, r"st\.shared\.f64[^;]*;", "", Uninitialised, 1),
    Planted("past shared memory", STEP, r"(ld\.shared\.f64.*)\+56\]", r"\1+64]", OutOfBounds, 1),
    Planted("all threads store the sum", STEP, r"@%p\d+ bra[^;]*;", "", Race, -1),
    Planted("blocks keep their sums", STEP, r"st\.global\.f64[^;]*;", "", Uninitialised, 1),
    Planted("another block size", STEP, r"\.maxntid 256", ".maxntid 128", BadLaunch),
    Planted("the wrong neighbour", FINISH, r"shfl\.sync\.down\.b32", "shfl.sync.up.b32", None),
    Planted("a mask of half a warp", FINISH, r"mov\.u32 (\s*%r\d+), -1;", r"mov.u32 \1, 65535;", Divergence),
    Planted("a block too many", FINISH, r"setp\.ge\.u32", "setp.gt.u32", OutOfBounds),
]


def score_and_pull(**how) -> tuple[Tensor, ...]:
    """A step of whole vectors, and the gradient of rows that end within one."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, 5, 4112, generator=generator)
    odd = [tensor[:, :4099].contiguous() for tensor in (latents, velocity)]
    with on_cuda.on_cpu(error="none", **how):
        state, log_prob = run(latents, velocity, torch.device("cpu"))
        leaf = odd[1].requires_grad_()
        scored = sde_log_prob(odd[0], leaf, odd[0] + leaf.detach(), TABLE, STEPS, implementation="cuda")
        return state, log_prob, torch.autograd.grad(scored.sum(), leaf)[0]


@EMULATED
@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_a_planted_fault_is_noticed(builds: Builds, planted: Planted) -> None:
    if planted.noticed is None:
        right, wrong = score_and_pull(built=builds(90)), score_and_pull(built=builds(90), edit=planted.edit)
        assert not all(torch.equal(one, other) for one, other in zip(wrong, right, strict=True))
        return
    with pytest.raises(Fault) as caught:
        score_and_pull(built=builds(90), edit=planted.edit)
    assert caught.type is planted.noticed
