"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read once, when the OpenMP runtime starts: before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from densegrpo_fast.flow import backends  # noqa: E402
from densegrpo_fast.flow.analytic import GaussianMixtureFlow  # noqa: E402
from densegrpo_fast.flow.schedule import sd3_sigmas  # noqa: E402
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity  # noqa: E402

if TYPE_CHECKING:
    from densegrpo_fast.training.learner import LearnerOptions

# the same examples in every run
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that continuous integration alone runs is slow for everybody else."""
    for item in items:
        if item.get_closest_marker("ci"):
            if item.get_closest_marker("slow"):
                raise pytest.UsageError(f"{item.nodeid} is marked ci and slow: continuous integration leaves out slow")
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """A network of half precision that is trained as a whole joins a process group of its own; it is gone after."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generator, and with no implementation chosen yet."""
    torch.manual_seed(0)
    backends.choices.clear()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so an element that an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class MixtureModel(FlowModel):
    """A flow model with an exact velocity that counts what it is asked for.

    Latents are vectors [4]. A prompt is the digits of the mixture components it allows, e.g. "02"; one without any
    allows all.

    Attributes:
        calls: (rows, sigma, guidance_scale) of every call of `velocity`.
        decoded: rows of every call of `decode`.
    """

    latent_shape = (4,)
    device = torch.device("cpu")

    def __init__(self) -> None:
        means = torch.tensor([[2.0, 0, 0, 1], [-1, 1.5, 0, -1], [0, -2, 1, 0]], dtype=torch.float64)
        self.flow = GaussianMixtureFlow(means, 0.4)
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, float, float]] = []
        self.decoded: list[int] = []

    @property
    def evaluated_rows(self) -> int:
        """Rows whose velocity was asked for so far."""
        return sum(rows for rows, _, _ in self.calls)

    def encode(self, prompts: list[str]) -> Conditioning:
        unique = list(dict.fromkeys(prompts))
        allowed = torch.tensor([[float(str(k) in prompt) for k in range(3)] for prompt in unique])
        allowed[allowed.sum(1) == 0] = 1.0
        rows = torch.tensor([unique.index(prompt) for prompt in prompts])
        return Conditioning({"allowed": allowed}, {"allowed": torch.ones(1, 3)}, rows)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        assert len(latents) == len(sigma) == len(conditioning)
        self.calls.append((len(latents), sigma[0].item(), guidance_scale))
        cond = torch.empty_like(latents)
        for number in conditioning.rows.unique():
            mine = conditioning.rows == number
            flow = self.flow.condition(conditioning.prompts["allowed"][number].nonzero().flatten().tolist())
            cond[mine] = flow.velocity(latents[mine], sigma[mine]).to(latents.dtype)
        if guidance_scale == 1.0:
            return Velocity(cond, None, 1.0)
        return Velocity(cond, self.flow.velocity(latents, sigma).to(latents.dtype), guidance_scale)

    def reference(self) -> AbstractContextManager[None]:
        return nullcontext()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"bias": self.bias}

    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        self.decoded.append(len(latents))
        return latents.sigmoid().view(-1, 1, 2, 2).expand(-1, 3, 2, 2)

    def sigmas(self, num_steps: int) -> Tensor:
        return sd3_sigmas(num_steps, shift=3.0)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit methods, policy losses and step weightings that a test registers are gone after it."""
    from densegrpo_fast.credit.registry import METHODS
    from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS

    for registry in (METHODS, POLICIES, STEP_WEIGHTS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))


@pytest.fixture
def mixture_model() -> MixtureModel:
    """A fresh `MixtureModel`."""
    return MixtureModel()


@pytest.fixture
def tiny_policy() -> Callable[..., FlowModel]:
    """Makes tiny SD3 models with an adapter: `tiny_policy(spread=0.0, rank=2, alpha=4)`.

    A fresh adapter changes nothing (its B is zero); `spread` is the standard deviation of the B that it gets instead.
    """
    from densegrpo_fast.models.lora import add_lora
    from densegrpo_fast.models.tiny import tiny_sd3

    def make(spread: float = 0.0, rank: int = 2, alpha: int = 4) -> FlowModel:
        model = tiny_sd3()
        add_lora(model.network, rank=rank, alpha=alpha, targets=["attn.to_q", "attn.to_v", "attn.to_out.0"], seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.trainable_parameters().items():
            if spread and ".lora_B." in name:
                parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def learner_options() -> Callable[..., LearnerOptions]:
    """Makes what a learner is told, by names of `LearnerOptions` and `ObjectiveSettings`: `learner_options(lr=0.1)`.

    Unless changed: one update of all four rows, clipped far away, without KL, guards, weights, decay or warm-up.
    """
    from densegrpo_fast.objective.policy import ObjectiveSettings
    from densegrpo_fast.training.learner import LearnerOptions

    objective = {"policy": "clip", "clip_range": 0.5, "guard_weight": "none", "dppo_threshold": 1.0}
    objective |= {"step_weight": "none", "kl_coef": 0.0, "kl_scale": "flow_grpo"}
    optimizer = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8, "max_grad_norm": 1e6}
    optimizer |= {"updates_per_iteration": 1, "warmup": 0, "ema_decay": 0.9, "ema_every": 1}
    optimizer |= {"micro_batch": 4, "max_bad_steps": 2}

    def make(**changes: Any) -> LearnerOptions:
        own = {name: changes.pop(name, value) for name, value in objective.items()}
        return LearnerOptions(**{**optimizer, **changes}, objective=ObjectiveSettings(**own))

    return make


@pytest.fixture(scope="session")
def pipeline_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory with the embedded model's architecture and random weights."""
    from densegrpo_fast.embedded import architecture, scenes
    from densegrpo_fast.embedded.stages import save

    directory = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = architecture.build_pipeline([s.prompt for c in scenes.CATEGORIES for s in scenes.all_scenes(c)])
        pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        save(pipeline, architecture.build_preview_decoder(), directory)
    return directory


CLIP_PROMPTS = ["a red circle", "two blue squares", "a green cross"]
"""What the tokenizer of `clip_directory` knows."""


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP (pictures of 28 pixels, 8 features) with its tokenizer, saved as transformers does."""
    from transformers import CLIPConfig, CLIPModel

    from densegrpo_fast.embedded.architecture import build_tokenizer

    path = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer(CLIP_PROMPTS)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small | {"image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class TrainCommand:
    """The training command on a random pipeline, with settings that make an iteration a fraction of a second.

    `train(output, *flags, **{"section.key": value})` runs it in this process and returns its exit code.
    """

    SETTINGS = {
        "run.iterations": 3,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": 9,
        # counting takes longer than such an iteration
        "run.memory_check": "off",
        "data.num_prompts": 2,
        "sampler.group_size": 2,
        "sampler.num_steps": 3,
        "sampler.micro_batch": 2,
        "sampler.noise_level": 0.7,
        "window.schedule": "none",
        "window.size": "null",
        "lookahead.plan": "exact",
        "lookahead.decoder": "preview",
        "lookahead.monitor_every": 0,
        # a random model draws no scenes, but pictures of different file sizes
        "reward.terms": "{jpeg_incompressibility: 1.0}",
        "reward.observed": "[scenes]",
        "evaluation.num_prompts": 2,
        "evaluation.samples_per_prompt": 1,
        "evaluation.num_steps": 2,
        "evaluation.every": 2,
        "lora.rank": 2,
        "lora.alpha": 4,
        "optimizer.updates_per_iteration": 2,
        "optimizer.lr": 1e-3,
        "objective.trained_steps": 1,
    }

    def __init__(self, model: Path) -> None:
        self.model = model

    def arguments(self, output: Path, *flags: str, **options: object) -> list[str]:
        """The command line for a run directory."""
        settings = {**self.SETTINGS, "model.path": self.model, "run.output_dir": output, **options}
        if not any(flag.startswith("--config") for flag in flags):
            flags = ("--config=embedded_dense", *flags)
        return [*flags, *(f"--{key}={value}" for key, value in settings.items())]

    def __call__(self, output: Path, *flags: str, **options: object) -> int:
        from densegrpo_fast.train import main

        try:
            return main(self.arguments(output, *flags, **options))
        except SystemExit as stop:
            return int(stop.code or 0)


@pytest.fixture(scope="session")
def train(pipeline_directory: Path) -> TrainCommand:
    """The training command, ready to run."""
    return TrainCommand(pipeline_directory)


_RUN_CONFIG = """preset: embedded_dense
seed: 7
model: {path: embedded}
run: {iterations: 40}
sampler: {group_size: 8, num_steps: 2, noise_level: [0.7, 0.5]}
reward:
  terms: {"<script>alert(1)</script>": 1.0}
"""
_RUN_PROMPTS = ["a <b>red</b> circle", "two & two"]


def run_record_of(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "reward": 0.5 + 0.01 * iteration,
        "gain/step_0": 0.1,
        "gain/step_1": -0.02 + 0.001 * iteration,
        "gain_positive/step_1": 0.25,
        "clip_fraction": 0.2,
        "grad_norm": None if iteration == 3 else 0.4 + 0.01 * iteration,
        "kl": None,
        "nfe/rollout": 80,
        "time/rollout": 0.75,
        "time/monitor": 0.0,
        "time/update": 1.5 + 0.01 * iteration,
        "flops/over_sparse": 1.5,
        **({"alarms": ["zero_spread"]} if iteration in (3, 4, 20) else {}),
    }


def fill_run_directory(
    directory: Path, done: int = 40, times: tuple[str, ...] = ("before", "iteration-00020", "after")
) -> Path:
    """A run directory as training leaves it."""
    from PIL import Image

    from densegrpo_fast.run_files.images import save_grid
    from densegrpo_fast.run_files.strip import Strip, StripRow, save_strip

    directory.mkdir()
    (directory / "config.yaml").write_text(_RUN_CONFIG)
    lines = [json.dumps(run_record_of(iteration)) + "\n" for iteration in range(1, done + 1)]
    (directory / "metrics.jsonl").write_text("".join(lines))
    for number, when in enumerate(times):
        iteration = {"before": 0, "after": done}.get(when, 20)
        scores = {"reward": [[0.5, 0.7 + 0.1 * number], [0.9 - 0.2 * number, None]]}
        document = {"iteration": iteration, "prompts": _RUN_PROMPTS, "scores": scores}
        (directory / f"evaluation-{when}.json").write_text(json.dumps(document))
        pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        save_grid(pictures, directory / "samples" / f"{when}.png", columns=2, captions=_RUN_PROMPTS)
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    row = StripRow("highest & best", [grey, grey], [None, grey], [math.nan, 0.75], [math.nan, 0.25])
    for iteration in {1, done} if done else ():
        strip = Strip("a <i>cat</i>", "a note", ["noise", "image"], [row])
        save_strip(strip, directory / "strips" / f"iteration-{iteration:05d}.png")
    return directory


@pytest.fixture(scope="session")
def fill_run() -> Callable[..., Path]:
    """Makes a run directory: `fill_run(path, done=40, times=("before", "iteration-00020", "after"))`."""
    return fill_run_directory


@pytest.fixture(scope="session")
def run_record() -> Callable[[int], dict[str, Any]]:
    """The record that `fill_run` writes for an iteration."""
    return run_record_of
