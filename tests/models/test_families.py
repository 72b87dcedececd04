"""Every family of models against its diffusers pipeline: tiny random ones, saved to disk and loaded as any other."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from densegrpo_fast import Trainer, load_config
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models import flops
from densegrpo_fast.models.base import Conditioning
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.families import FAMILIES, family_of
from densegrpo_fast.models.loading import load_pipeline
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.lora import COMFYUI_FILE, add_lora, save_lora
from densegrpo_fast.models.memory import ModelMemory, module_bytes
from densegrpo_fast.models.prompt_cache import PromptCache
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.models.supported import PIPELINES
from densegrpo_fast.models.tiny import tiny_model
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.replay import replay
from densegrpo_fast.sampling.rollout import Trajectory, rollout, sample_ode

CPU = torch.device("cpu")
PROMPTS = ["a photo of a cat", "the moon", "a photo of a cat"]
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A family under test.

    Attributes:
        pipeline: class of its pipeline.
        guidance: scales at which it is compared; the second one is used elsewhere.
        network: entries of the network's configuration other than the tiny pipeline's.
        scheduler: likewise, of the scheduler's.
        text: longest text in tokens; the prompts differ in length where it allows that.
        frames: of a video.
        seed: of the tiny weights.
        iterations, learning: of the training that raises a reward, with settings other than the families' usual ones.
    """

    pipeline: str
    guidance: tuple[float, ...] = (1.0, 3.0)
    network: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    text: int = 8
    frames: int = 1
    seed: int = 0
    iterations: int = 20
    learning: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "sd35_large": Case(
        "StableDiffusion3Pipeline", network={"dual_attention_layers": ()}, scheduler={"use_dynamic_shifting": True}
    ),
    "flux_dev": Case("FluxPipeline"),
    "flux_schnell": Case(
        "FluxPipeline",
        guidance=(1.0,),
        network={"guidance_embeds": False},
        scheduler={"use_dynamic_shifting": False, "shift": 1.0},
    ),
    "sd15": Case("StableDiffusionPipeline"),
    "sd21": Case(
        "StableDiffusionPipeline",
        scheduler={"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "sdxl": Case("StableDiffusionXLPipeline"),
    "qwen_image": Case("QwenImagePipeline", text=300),
    "z_image": Case("ZImagePipeline", text=64),
    # its tiny random network and decoder answer to an adapter a tenth as much as the others', so it takes more samples
    "flux2_klein": Case(
        "Flux2KleinPipeline",
        text=64,
        seed=4,
        iterations=40,
        learning={
            "sampler.group_size": 24,
            "sampler.micro_batch": 24,
            "lookahead.chunk": 64,
            "optimizer.lr": 0.03,
        },
    ),
    "wan_picture": Case("WanPipeline", text=64),
    "wan_video": Case("WanPipeline", text=64, frames=5, iterations=40, learning={"reward.frames": 5}),
}
PARAMETERS = {
    "sd35_medium": 2.24e9,
    "sd35_large": 8.06e9,
    "flux": 11.90e9,
    "sd15": 0.8595e9,
    "sdxl": 2.567e9,
    "qwen_image": 20.43e9,
    "z_image": 6.15e9,
    "flux2_klein": 3.88e9,
    "wan21_1b": 1.42e9,
}
"""Of the networks, as their model cards or the sizes of their files say."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def directory(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_model(case.pipeline, case.seed, network=case.network, scheduler=case.scheduler, frames=case.frames)
    path = tmp_path_factory.mktemp(case.pipeline)
    made.pipeline.save_pretrained(path)
    assert (made.preview_decoder is None) == made.family.video
    if made.preview_decoder is not None:
        made.preview_decoder.save_pretrained(path / "preview_decoder")
    return path


def loaded(case: Case, directory: Path, **options: Any) -> DiffusersModel:
    settings = {"max_sequence_length": case.text, "height": 64, "width": 64, "frames": case.frames} | options
    model = load_pipeline(str(directory), device=CPU, dtype=torch.float32, **settings)
    model.pipeline.set_progress_bar_config(disable=True)
    if model.family.sampler is not None:
        sampler = getattr(diffusers, model.family.sampler)
        model.pipeline.scheduler = sampler.from_config(model.pipeline.scheduler.config)
    return model


@pytest.fixture(scope="module")
def plain(case: Case, directory: Path) -> DiffusersModel:
    return loaded(case, directory)


def with_adapter(case: Case, directory: Path, spread: float = 0.1, **options: Any) -> DiffusersModel:
    """A model whose adapter changes something."""
    model = loaded(case, directory, **options)
    add_lora(model.network, rank=2, alpha=4, targets=list(model.family.lora_targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable_parameters().items():
        if ".lora_B." in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def policy(case: Case, directory: Path) -> DiffusersModel:
    return with_adapter(case, directory)


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest value, at which float32 rounds."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


def gradients_of(loss: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Zero for what is not used: the last block of Qwen-Image computes text that nobody reads."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def drawn(model: DiffusersModel, guidance_scale: float, noise: Tensor | None = None, steps: int = STEPS) -> Tensor:
    noise, sigmas = torch.randn(3, *model.latent_shape) if noise is None else noise, model.sigmas(steps)
    return sample_ode(model, model.start(noise, sigmas), model.encode(PROMPTS), sigmas, guidance_scale=guidance_scale)


def called(model: DiffusersModel, noise: Tensor, scale: float, output: str, steps: int = STEPS) -> Any:
    """What the pipeline's own call makes of the noise."""
    made = model.pipeline(
        # a list of its own: Z-Image's pipeline writes into it
        prompt=list(PROMPTS),
        height=model.family.height,
        width=model.family.width,
        num_inference_steps=steps,
        latents=noise,
        output_type=output,
        **model.family.call_options(scale),
    )[0]
    if made.ndim == 5:
        # frames first, and those of one frame are pictures
        made = made.transpose(1, 2)
    return made[:, :, 0] if made.ndim == 5 and made.shape[2] == 1 else made


def test_each_supported_class_has_a_family() -> None:
    assert tuple(FAMILIES) == PIPELINES


@pytest.mark.ci
@pytest.mark.parametrize("width", [64, 96])
@torch.no_grad()
def test_noise_free_sampling_is_the_pipeline_s_own_call(case: Case, directory: Path, width: int) -> None:
    model = loaded(case, directory, width=width)
    noise = torch.randn(3, *model.latent_shape)
    drawings = []
    for scale in case.guidance:
        ours, theirs = model.decode(drawn(model, scale, noise)), called(model, noise, scale, "pt")
        assert ours.shape == (3, 3, *([case.frames] if case.frames > 1 else []), 64, width)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        drawings.append(ours)
        if hasattr(model.pipeline.scheduler, "sigmas") and not model.family.scales_input:
            assert torch.equal(model.sigmas(STEPS)[1:], model.pipeline.scheduler.sigmas[1:])
    if len(drawings) > 1:
        assert (drawings[0] - drawings[1]).abs().max() > 1e-4


@pytest.mark.ci
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("case", ["sd15", "sd21"], indirect=True)
@torch.no_grad()
def test_many_steps_are_ddim_s(case: Case, directory: Path, steps: int) -> None:
    model = loaded(case, directory)
    assert type(model.pipeline.scheduler).__name__ == "DDIMScheduler"
    noise = torch.randn(3, *model.latent_shape)
    close(model.decode(drawn(model, 3.0, noise, steps)), called(model, noise, 3.0, "pt", steps))


def trajectory(model: DiffusersModel, scale: float) -> Trajectory:
    table = coefficients(model.sigmas(STEPS), 0.7, "flow_sde")
    noise, index = torch.randn(4, *model.latent_shape), torch.arange(4)
    return rollout(
        model,
        noise,
        model.encode([*PROMPTS, "the moon"]),
        table,
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=scale,
        micro_batch=2,
    )


def test_an_unchanged_policy_s_ratio_is_1_and_its_gradient_the_derivative(case: Case, policy: DiffusersModel) -> None:
    path, rows = trajectory(policy, case.guidance[-1]), slice(2, 4)
    for step in range(STEPS):
        log_prob, velocity = replay(policy, path, step, rows)
        assert torch.equal(log_prob.detach(), path.log_probs[step, rows])
        assert torch.equal(velocity.detach(), path.velocities[step, rows])
    # central differences, in float64
    policy = copy(policy)
    policy.network = deepcopy(policy.network).double()
    parameters = list(policy.trainable_parameters().values())
    generator = torch.Generator().manual_seed(2)
    ways = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss() -> Tensor:
        return replay(policy, path, 1, rows)[0].double().sum()

    gradients = gradients_of(loss(), parameters)
    slope = sum((way * gradient).sum() for way, gradient in zip(ways, gradients, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for way, parameter in zip(ways, parameters, strict=True):
                parameter.add_(sign * 1e-4 * way)
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / 2e-4, torch.as_tensor(slope), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_exact_lookahead_is_the_serial_completion(case: Case, policy: DiffusersModel) -> None:
    scale = case.guidance[-1]
    path = trajectory(policy, scale)
    clean, sigmas = Lookahead(policy, plans.exact(STEPS), chunk=3).complete(path), policy.sigmas(STEPS)
    for state in range(STEPS + 1):
        latents = path.latents[state]
        for step in range(state, STEPS):
            velocity = policy.velocity(latents, sigmas[step].expand(4), path.conditioning, scale).combined()
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        close(clean[state], latents)


@pytest.mark.ci
@torch.no_grad()
def test_an_adapter_changes_the_pictures_and_loads_in_plain_diffusers(
    case: Case, plain: DiffusersModel, policy: DiffusersModel, directory: Path, tmp_path: Path
) -> None:
    scale, noise = case.guidance[-1], torch.randn(3, *plain.latent_shape)
    before, after = (model.decode(drawn(model, scale, noise)) for model in (plain, policy))
    assert len(policy.trainable_parameters()) >= 2 * len(policy.family.lora_targets)
    assert (after - before).abs().max() > 1e-3
    save_lora(policy.network, tmp_path, rank=2, alpha=4)
    # ComfyUI's own file, where there is one, by diffusers' reader of such names
    for file in sorted(tmp_path.glob("*.safetensors")):
        fresh = loaded(case, directory)
        fresh.pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        torch.testing.assert_close(called(fresh, noise, scale, "pt"), after, rtol=1e-5, atol=1e-5)
    families = {"UNet2DConditionModel", "WanTransformer3DModel"}
    assert (tmp_path / COMFYUI_FILE).exists() == (type(policy.network).__name__ in families)
    # with the adapter off, the policy is what was loaded
    with policy.reference():
        torch.testing.assert_close(policy.decode(drawn(policy, scale, noise)), before, rtol=1e-5, atol=1e-5)


def velocity(model: DiffusersModel, scale: float, conditioning: Conditioning | None = None) -> Tensor:
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    given = model.encode(PROMPTS) if conditioning is None else conditioning
    return model.velocity(latents, torch.tensor([0.9, 0.5, 0.2]), given, scale).combined()


@pytest.mark.ci
def test_cheaper_ways_compute_the_same(case: Case, policy: DiffusersModel, directory: Path, tmp_path: Path) -> None:
    scale = case.guidance[-1]
    parameters = list(policy.trainable_parameters().values())
    expected = velocity(policy, scale)
    gradients = gradients_of(expected.square().sum(), parameters)
    # encoded prompts from disk, of text encoders that are gone
    cached = with_adapter(case, directory, prompt_store=PromptCache(tmp_path, {}))
    assert cached.prepare(PROMPTS) == 3 and cached.pipeline.text_encoder is None
    close(velocity(cached, scale), expected)
    # the blocks' activations computed again
    cached.checkpoint_gradients()
    again = velocity(cached, scale)
    found = gradients_of(again.square().sum(), list(cached.trainable_parameters().values()))
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for one, two in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * largest)
    # merged weights
    with torch.no_grad():
        close(velocity(LookaheadCopy(policy), scale), expected)
    assert bool(policy.blocks()) == (policy.family.network_part == "transformer")


@pytest.mark.ci
def test_operations_and_memory_are_counted_without_weights(case: Case, plain: DiffusersModel) -> None:
    architecture, targets = flops.architecture_of(plain), plain.family.lora_targets
    found = flops.count(architecture, lora_rank=2, lora_targets=targets)
    latents, conditioning = torch.zeros(1, *plain.latent_shape), plain.encode([plain.family.negative_prompt])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        counted = flops.counted(lambda: plain.velocity(latents, torch.ones(1), conditioning))
        assert found.reference_forward == pytest.approx(counted, rel=1e-6)
        assert found.full_decode == pytest.approx(flops.counted(lambda: plain.decode(latents)), rel=1e-6)
        if plain.preview_decoder is not None:
            counted = flops.counted(lambda: plain.decode(latents, "preview"))
            assert found.preview_decode == pytest.approx(counted, rel=1e-6)
    memory = ModelMemory(architecture, dtype=torch.float32, lora_rank=2, lora_targets=targets)
    assert memory.transformer == module_bytes(plain.network)
    assert memory.update(2, forwards=1, checkpointing=True) < memory.update(2, forwards=1, checkpointing=False)
    assert memory.picture == 4 * plain.decode(latents).numel()


@pytest.mark.ci
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_counted(name: str) -> None:
    """On the meta device, from its configuration."""
    architecture = flops.known(name)
    with torch.device("meta"), torch.no_grad():
        network = architecture.network()
        inputs = architecture.inputs(network, 1)
        assert flops.counted(lambda: network(**inputs)) > 0
        vae = architecture.full_decoder()
        assert architecture.decode(vae, torch.empty(1, *architecture.latent_shape)).shape[1] == 3
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)


def test_a_video_is_scored_by_its_frames() -> None:
    videos = torch.rand(2, 3, 5, 8, 8)

    def still(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        assert images.ndim == 4 and len(prompts) == len(metadata) == len(images)
        return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]

    class Moving:
        takes_videos = True

        def __call__(self, videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            return videos.diff(dim=2).abs().mean((1, 2, 3, 4))

    for frames, places in ((1, [2]), (2, [1, 3]), (9, [0, 1, 2, 3, 4])):
        scores = RewardMixture({"still": (still, 1.0), "moving": (Moving(), 0.0)}, frames=frames)(videos, ["a", "bc"])
        expected = videos[:, :, places].mean((1, 2, 3, 4)) + torch.tensor([1.0, 2.0])
        torch.testing.assert_close(scores.per_reward["still"], expected)
        torch.testing.assert_close(scores.per_reward["moving"], videos.diff(dim=2).abs().mean((1, 2, 3, 4)))
    broken = videos.clone()
    broken[1, 0, 4, 0, 0] = torch.nan
    assert RewardMixture({"still": (still, 1.0)})(broken, ["a", "b"]).values.isnan().tolist() == [False, True]


def test_wan_is_drawn_by_euler_with_its_own_shift() -> None:
    model = tiny_model("WanPipeline", frames=5)
    multistep = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    expected = model.sigmas(STEPS)
    model.pipeline.scheduler = multistep
    other = DiffusersModel(model.pipeline, max_sequence_length=8, height=64, width=64, frames=5)
    assert torch.equal(other.sigmas(STEPS), expected)
    assert (other.family.sampler, other.family.sampler_options) == ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(multistep.config, **other.family.sampler_options)
    euler.set_timesteps(STEPS)
    assert torch.equal(euler.sigmas[1:], expected[1:])
    with pytest.raises(UserError, match="model.frames: expected 1 more than a multiple of 4, got 4"):
        tiny_model("WanPipeline", frames=4)
    with pytest.raises(UserError, match="model.frames: expected 1 for FluxPipeline, which makes pictures, got 5"):
        tiny_model("FluxPipeline", frames=5)


def test_a_distilled_klein_takes_no_guidance_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("Flux2KleinPipeline")
    model.pipeline.register_to_config(is_distilled=True)
    distilled = DiffusersModel(model.pipeline, max_sequence_length=8, height=64, width=64)
    assert "distilled" in caplog.text and distilled.forwards(4.0) == 1 and model.forwards(4.0) == 2
    with torch.no_grad():
        assert torch.equal(velocity(distilled, 4.0), velocity(distilled, 1.0))
    with pytest.raises(ValueError, match="guidance_embeds must be false"):
        tiny_model("Flux2KleinPipeline", network={"guidance_embeds": True})


class Training:
    """A trainer of a family's tiny pipeline on a reward that is known: how much more red than blue a picture has."""

    def __init__(self, case: Case, directory: Path, path: Path, seed: int = 0, **settings: Any):
        reward = path / "redder.py"
        reward.write_text(
            "def reward(images, prompts, metadata):\n"
            "    return [float(image[0].mean() - image[2].mean()) for image in images]\n"
        )
        options = {
            "seed": seed,
            "model.path": str(directory),
            "model.max_sequence_length": case.text,
            "model.height": 64,
            "model.width": 64,
            "model.frames": case.frames,
            "lora.rank": 2,
            "lora.alpha": 4,
            "data.num_prompts": 2,
            "sampler.group_size": 4,
            "sampler.num_steps": STEPS,
            "sampler.micro_batch": 4,
            "sampler.guidance_scale": case.guidance[-1],
            "window.schedule": "none",
            "window.size": None,
            "lookahead.monitor_every": 0,
            "optimizer.lr": 1e-2,
            "optimizer.updates_per_iteration": 1,
            "reward.terms": {f"{reward}:reward": 1.0},
            "reward.observed": [],
            "run.output_dir": str(path / "run"),
        }
        config = load_config("embedded_dense", options | settings)
        self.lora = config.lora
        targets = list(family_of(case.pipeline).lora_targets)
        self.config = config.model_copy(update={"lora": config.lora.model_copy(update={"targets": targets})})
        self.trainer = Trainer(self.config)


@pytest.mark.ci
def test_a_resumed_run_goes_on_bit_for_bit(case: Case, directory: Path, tmp_path: Path) -> None:
    trainer = Training(case, directory, tmp_path).trainer
    first = trainer.step(0)
    assert first["ratio_deviation"] <= 1e-6
    tensors, state = deepcopy(trainer.tensors()), deepcopy(trainer.state())
    whole = trainer.step(1)
    again = Training(case, directory, tmp_path).trainer
    again.restore(tensors, state)
    found = again.step(1)
    assert found["reward"] == whole["reward"] != first["reward"]
    for group, named in trainer.tensors().items():
        for name, tensor in named.items():
            assert torch.equal(tensor, again.tensors()[group][name]), (group, name)


@pytest.mark.slow
def test_training_raises_a_reward_that_is_known(case: Case, directory: Path, tmp_path: Path) -> None:
    gains = []
    for seed in range(5):
        training = Training(case, directory, tmp_path, seed=seed, **case.learning)
        rewards = [training.trainer.step(iteration)["reward"] for iteration in range(case.iterations)]
        gains.append(sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4)
    # chance alone makes all five positive in one of 32
    assert min(gains) > 0, gains


def test_what_builds_no_model_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that wants other arguments than docs/models.md says."""
    (tmp_path / "mine.py").write_text("class Pixels:\n    def __init__(self, device):\n        self.device = device\n")
    monkeypatch.chdir(tmp_path)
    options = {"model.path": "mine.py:Pixels", "run.output_dir": "run", "reward.observed": []}
    with pytest.raises(UserError, match="model.path: mine.py:Pixels: TypeError"):
        Trainer(load_config("embedded_dense", options)).run()
