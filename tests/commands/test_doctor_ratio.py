"""The ratio doctor names what is wrong: faults are put into the loop of a tiny SD3 policy, one and two at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from densegrpo_fast.doctor import __main__ as doctor
from densegrpo_fast.doctor import ratio
from densegrpo_fast.doctor.causes import CAUSES, unmerged_adapter
from densegrpo_fast.doctor.loop import Loop, configured_loop, lora_layers, randomize_lora_
from densegrpo_fast.doctor.ratio import Diagnosis, default_tolerance, diagnose, within
from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.sampling import replay as replaying
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout

T, ROWS, MICRO_BATCH = 3, 4, 2
PROMPTS = ["a photo of a cat", "a photo of a cat", "the moon", "the moon"]
TOLERANCE = 1e-6
FAINT = 1e-3
"""Noise level at which a rounding error of a float32 velocity shows in the ratio."""

Policy = Callable[..., Any]
Phase = Callable[[], AbstractContextManager[object]]


def make_loop(model: Any, noise_level: float | list[float] = 0.7, replayed: int = MICRO_BATCH) -> Loop:
    """Rollout in micro-batches, and replay in batches of `replayed` rows, as training does it."""
    index = torch.arange(ROWS)
    table = coefficients(model.sigmas(T), noise_level, "flow_sde")

    def draw(given: StepCoefficients) -> Trajectory:
        noise = initial_noise(model, index, seed=0, iteration=0)
        return rollout(
            model,
            noise,
            model.encode(PROMPTS),
            given,
            sample_index=index,
            seed=0,
            iteration=0,
            micro_batch=MICRO_BATCH,
        )

    def score(trajectory: Trajectory, step: int) -> Tensor:
        starts = range(0, ROWS, replayed)
        parts = [replaying.replay(model, trajectory, step, slice(start, start + replayed))[0] for start in starts]
        return torch.cat(parts)

    return Loop(model, table, tuple(range(T - 1)), draw, score)


def within_rollout(loop: Loop, phase: Phase) -> Loop:
    def draw(table: StepCoefficients) -> Trajectory:
        with phase():
            return loop.rollout(table)

    return replace(loop, rollout=draw)


def within_replay(loop: Loop, phase: Phase) -> Loop:
    def score(trajectory: Trajectory, step: int) -> Tensor:
        with phase():
            return loop.replay(trajectory, step)

    return replace(loop, replay=score)


def stored(loop: Loop, **dtypes: torch.dtype) -> Loop:
    """The trajectory's fields go through another dtype after the rollout."""

    def draw(table: StepCoefficients) -> Trajectory:
        trajectory = loop.rollout(table)
        return replace(trajectory, **{name: getattr(trajectory, name).to(d).float() for name, d in dtypes.items()})

    return replace(loop, rollout=draw)


@contextmanager
def rounded_sigma(model: Any) -> Iterator[None]:
    """The model is told sigma in bfloat16."""
    own = model.velocity
    model.velocity = lambda latents, sigma, *rest: own(latents, sigma.bfloat16().float(), *rest)
    try:
        yield
    finally:
        del model.velocity


@contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Dropout of 2% in every layer that has one."""
    layers = [module for module in model.network.modules() if isinstance(module, nn.Dropout)]
    assert layers
    for layer in layers:
        layer.p = 0.02
    model.network.train()
    try:
        yield
    finally:
        model.network.eval()


@contextmanager
def merged(model: Any) -> Iterator[None]:
    model.network.fuse_lora()
    try:
        yield
    finally:
        model.network.unfuse_lora()


class HalfAttention(JointAttnProcessor2_0):
    """Joint attention whose products are taken in bfloat16."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        own = F.scaled_dot_product_attention

        def halved(*tensors: Tensor, **rest: Any) -> Tensor:
            return own(*(tensor.bfloat16() for tensor in tensors), **rest).float()

        F.scaled_dot_product_attention = halved
        try:
            return super().__call__(*args, **options)
        finally:
            F.scaled_dot_product_attention = own


@contextmanager
def half_attention(model: Any) -> Iterator[None]:
    before = model.network.attn_processors
    model.network.set_attn_processor(HalfAttention())
    try:
        yield
    finally:
        model.network.set_attn_processor(before)


@contextmanager
def on_output(model: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The first block's image tokens are changed."""
    block = model.network.transformer_blocks[0]
    handle = block.register_forward_hook(lambda _, __, out: (out[0], change(out[1])))
    try:
        yield
    finally:
        handle.remove()


def per_tensor_int8(tokens: Tensor) -> Tensor:
    """Rounded to 8 bits by one scale for the whole batch, as dynamic quantisation does."""
    scale = tokens.detach().abs().max() / 127
    return (tokens / scale).round() * scale


def bf16_under_grad(tokens: Tensor) -> Tensor:
    return tokens.bfloat16().float() if torch.is_grad_enabled() else tokens


def _with_attention_dropout(call: Callable[..., Any]) -> Callable[..., Any]:
    """The processor's call, with 10% dropout of the attention weights."""
    own = F.scaled_dot_product_attention

    def dropping(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return own(query, key, value, None, 0.1)

    def changed(*args: Any, **options: Any) -> Any:
        F.scaled_dot_product_attention = dropping
        try:
            return call(*args, **options)
        finally:
            F.scaled_dot_product_attention = own

    return changed


def test_a_sound_loop_needs_no_diagnosis(tiny_policy: Policy) -> None:
    found = diagnose(make_loop(tiny_policy(spread=0.3)), TOLERANCE)
    assert found.sound
    assert found.deviations == (0.0,) * (T - 1)
    assert found.causes == () and found.alone == {}


FAULTS: dict[str, Callable[[Any], Loop]] = {
    "storage: states in half precision": lambda m: stored(make_loop(m), latents=torch.float16),
    "storage: states in bfloat16": lambda m: stored(make_loop(m), latents=torch.bfloat16),
    "storage: log-probabilities in bfloat16": lambda m: stored(make_loop(m), log_probs=torch.bfloat16),
    "timestep: rounded in the replay": lambda m: within_replay(make_loop(m), lambda: rounded_sigma(m)),
    "timestep: rounded in the rollout": lambda m: within_rollout(make_loop(m), lambda: rounded_sigma(m)),
    "dropout: left on in the replay": lambda m: within_replay(make_loop(m), lambda: training_mode(m)),
    "autocast: replay": lambda m: within_replay(make_loop(m), lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast: rollout": lambda m: within_rollout(make_loop(m), lambda: torch.autocast("cpu", torch.bfloat16)),
    "adapter_off: rollout": lambda m: within_rollout(make_loop(m), m.reference),
    "attention: other kernel": lambda m: within_replay(make_loop(m, FAINT), lambda: sdpa_kernel(SDPBackend.MATH)),
    "attention: other processors": lambda m: within_replay(make_loop(m), lambda: half_attention(m)),
    "lora_merge: rollout": lambda m: within_rollout(make_loop(m, FAINT), lambda: merged(m)),
    "lora_merge: replay": lambda m: within_replay(make_loop(m, FAINT), lambda: merged(m)),
    "gradient_mode": lambda m: within_replay(make_loop(m), lambda: on_output(m, bf16_under_grad)),
}
AMPLIFIED = ("attention: other kernel", "lora_merge: rollout", "lora_merge: replay")


@pytest.mark.ci
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(tiny_policy: Policy, fault: str) -> None:
    loop = FAULTS[fault](tiny_policy(spread=0.3))
    found = diagnose(loop, TOLERANCE)
    assert not found.sound
    assert found.causes == (fault.partition(":")[0],), found.alone
    # a single fault needs no combination, and only float32's last digits need tiny noise to show
    assert found.together is None
    assert found.amplified == (tuple(range(T - 1)) if fault in AMPLIFIED else ())
    assert (found.unsteady > 0) == fault.startswith("dropout")


@pytest.mark.ci
def test_another_split_is_named(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    with on_output(model, per_tensor_int8):
        assert diagnose(make_loop(model), TOLERANCE).sound
        for size in (1, ROWS):
            assert diagnose(make_loop(model, replayed=size), TOLERANCE).causes == ("batch_shape",)


def test_a_state_rounded_behind_the_log_probability_is_named(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rollout goes on from the rounded state, but the log-probability is that of the exact one.
    own = ops.sde_step_outputs

    def rounding(*args: Any, **options: Any) -> ops.StepOutputs:
        found = own(*args, **options)
        return found._replace(next_latents=found.next_latents.bfloat16().float())

    monkeypatch.setattr(ops, "sde_step_outputs", rounding)
    assert diagnose(make_loop(tiny_policy(spread=0.3)), TOLERANCE).causes == ("storage",)


def test_dropout_inside_attention_is_named(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(JointAttnProcessor2_0, "__call__", _with_attention_dropout(JointAttnProcessor2_0.__call__))
    assert diagnose(make_loop(tiny_policy(spread=0.3)), TOLERANCE).causes == ("dropout",)
    assert F.scaled_dot_product_attention is own


@pytest.mark.ci
def test_two_faults_are_both_named(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    loop = stored(within_replay(make_loop(model), lambda: rounded_sigma(model)), latents=torch.float16)
    found = diagnose(loop, TOLERANCE)
    assert found.causes == ("storage", "timestep")
    assert all(not trial.deviation <= TOLERANCE for trial in found.alone.values())
    assert found.together is not None and found.together.deviation <= TOLERANCE
    assert set(found.all_but) == {cause.name for cause in CAUSES}


def test_an_unknown_fault_names_nobody(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    loop = make_loop(model)

    def score(trajectory: Trajectory, step: int) -> Tensor:
        # every row is scored under another prompt
        conditioning = trajectory.conditioning.select(torch.tensor([2, 3, 0, 1]))
        return loop.replay(replace(trajectory, conditioning=conditioning), step)

    found = diagnose(replace(loop, replay=score), TOLERANCE)
    assert found.causes == ()
    assert found.together is not None and found.together.deviation > TOLERANCE
    assert found.unsteady == 0


def test_randomness_is_noticed(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    noisy = within_replay(make_loop(model), lambda: on_output(model, lambda x: x + 0.1 * torch.randn_like(x)))
    found = diagnose(noisy, TOLERANCE)
    assert found.causes == ()
    assert found.unsteady > 1e-4


def test_tiny_noise_amplifies_what_has_no_name(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    loop = make_loop(model, [0.7, FAINT, 0.7])
    changed = within_replay(loop, lambda: on_output(model, lambda x: x * (1 + 1e-5)))
    found = diagnose(changed, 1e-5)
    assert [deviation > 1e-5 for deviation in found.deviations] == [False, True]
    assert found.causes == ()
    assert found.amplified == (1,)


def test_nothing_stays_behind(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    network = model.network
    processors, hooks = dict(network.attn_processors), [len(m._forward_pre_hooks) for m in network.modules()]
    with ExitStack() as stack:
        loop = make_loop(model)
        for cause in CAUSES:
            loop = stack.enter_context(cause.ablation(loop))
        assert loop.deviations() == (0.0,) * (T - 1)
        assert "forward" in vars(network)
    assert "forward" not in vars(network)
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    assert dict(network.attn_processors) == processors
    assert not any("merge" in vars(layer) for layer in lora_layers(network))


def test_a_merged_adapter_is_merged_again(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    model.network.fuse_lora()
    with unmerged_adapter(make_loop(model)):
        assert not any(layer.merged for layer in lora_layers(model.network))
    assert all(layer.merged for layer in lora_layers(model.network))


def test_a_trial_that_fails_is_told_and_not_blamed(tiny_policy: Policy) -> None:
    # A rollout of its own making: nothing goes through ops.sde_step, so what it stored cannot be compared.
    model = tiny_policy(spread=0.3)
    loop = make_loop(model)
    ready = loop.rollout(loop.coefficients)
    half = replace(loop, rollout=lambda _: replace(ready, latents=ready.latents.half().float()))
    found = diagnose(half, TOLERANCE)
    assert found.causes == ()
    assert "another function than ops.sde_step" in found.alone["storage"].failure


def test_a_ratio_that_is_no_number_is_not_1(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    loop = make_loop(model)
    broken = replace(loop, replay=lambda trajectory, step: loop.replay(trajectory, step) * float("nan"))
    assert not diagnose(broken, TOLERANCE).sound
    assert within((), TOLERANCE) and not within((0.0, float("nan")), TOLERANCE)


def test_tolerance() -> None:
    assert default_tolerance(1e-3) == pytest.approx(1e-5)
    # a hundredth of it would be less than float32 can tell
    assert default_tolerance(1e-5) == 1e-6


def test_a_fresh_adapter_gets_random_values(tiny_policy: Policy) -> None:
    model = tiny_policy()
    randomize_lora_(model.network)
    for layer in lora_layers(model.network):
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        share = update.norm() / layer.get_base_layer().weight.norm()
        assert share.item() == pytest.approx(0.05, rel=1e-3)
    learnt = tiny_policy(spread=0.3)
    before = {name: parameter.clone() for name, parameter in learnt.trainable_parameters().items()}
    randomize_lora_(learnt.network)
    assert all(torch.equal(parameter, before[name]) for name, parameter in learnt.trainable_parameters().items())


@pytest.fixture
def settings(pipeline_directory: Path) -> list[str]:
    """A loop of a second: a random pipeline, three steps, six samples of which two micro-batches are drawn."""
    options = {
        "model.path": pipeline_directory,
        "data.num_prompts": 3,
        "sampler.group_size": 2,
        "sampler.num_steps": 3,
        "sampler.micro_batch": 2,
        "sampler.noise_level": 0.7,
        "window.schedule": "none",
        "window.size": "null",
        "lookahead.plan": "exact",
        "lookahead.nodes": "[]",
        "lookahead.cache": "null",
        "objective.kl_coef": 0.1,
        "objective.clip_range": 1e-3,
        "lora.rank": 2,
    }
    return ["--config=embedded_dense", *(f"--{key}={value}" for key, value in options.items())]


def test_the_command_finds_a_sound_loop(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--ratio", "--json", str(tmp_path / "found.json"), *settings]) == 0
    assert "ok: it is 1, to 1.0e-05 (tolerance)" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["status"] == "ok"
    assert [step["step"] for step in found["steps"]] == [0, 1]
    assert all(step["ratio_deviation"] <= 1e-6 for step in found["steps"])


@pytest.mark.ci
def test_the_command_names_a_fault(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def faulty(*arguments: Any) -> Loop:
        loop = configured_loop(*arguments)
        drawn.append(loop.rollout(loop.coefficients).batch)
        return stored(loop, latents=torch.bfloat16)

    monkeypatch.setattr(ratio, "configured_loop", faulty)
    assert doctor.main(["--ratio", "--json", str(tmp_path / "found.json"), *settings]) == 8
    assert drawn == [4]
    out = capsys.readouterr().out
    assert "problem: it is not 1" in out
    assert "cause: storage: states or log-probabilities are stored in fewer digits" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["status"] == "problem"
    assert [cause["name"] for cause in found["causes"]] == ["storage"]
    assert found["without"]["storage"]["ratio_deviation"] <= 1e-6 < found["without"]["timestep"]["ratio_deviation"]


@pytest.mark.ci
def test_the_command_takes_a_tolerance(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio, "configured_loop", lambda *given: stored(configured_loop(*given), latents=torch.float16))
    assert doctor.main(["--ratio", *settings]) == 8
    assert doctor.main(["--ratio", "--tolerance", "1.0", *settings]) == 0


def test_a_model_without_weights_is_tried_as_a_tiny_one(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--ratio", "--dry-run", "--config", "sd35_medium_pickscore", "--sampler.num_steps=3"]
    assert doctor.main([*command, "--lora.targets=[attn.to_q, attn.to_v]", "--lookahead.plan=exact"]) == 0
    assert "ok: it is 1" in capsys.readouterr().out


def test_words_for_every_verdict() -> None:
    table = coefficients(torch.tensor([1.0, 0.5, 0.0]), 0.7, "flow_sde")
    loop = Loop(None, table, (0,), None, None)  # type: ignore[arg-type]
    unnamed = Diagnosis((0.5,), 1e-6, unsteady=2e-3, amplified=(0,))
    words = ratio.text(ratio.record(unnamed, loop, 1e-3) | {"preset": "mine"})
    assert "none of the causes" in words
    assert "differ by 2.0e-03 in log-probability" in words
    assert "amplified at step 0" in words
    assert "50000.0%" in words
