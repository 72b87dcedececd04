"""Stable Diffusion 1.x, 2.x and XL: models of the noise (or of v) on a variance-preserving path, seen as flow models.

A latent of such a model is x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1. In the variables

    z = x / (alpha + sigma) = (1 - t) x0 + t eps,    t = sigma / (alpha + sigma),    v = eps - x0

it is a rectified flow's, and a DDIM step (arXiv 2010.02502) is Euler's step in t, exactly. So every sampler, window,
kernel and lookahead of this package works on z and t; x = z / sqrt((1 - t)^2 + t^2) is what the network sees.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from densegrpo_fast.models.family import Family, Prompts


class StableDiffusion(Family):
    """`StableDiffusionPipeline`: 1.4, 1.5, 2.0 and 2.1.

    Its noise-free sampler is DDIM, on the timesteps that the configuration of a DDIM, PNDM or Euler scheduler asks for.
    (PNDM's multistep formula is not used, as in DDPO and DanceGRPO.) The grid need not begin at 1, nor end at 0: the
    first latents are pure noise by definition, and the last level may be that of timestep 0.
    """

    pipeline_class = "StableDiffusionPipeline"
    parts = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    unused: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    network_part = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    scales_input = True
    added_embedding: str | None = None
    """What the network takes besides time and text, as its configuration calls it."""

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        config = self.config
        if config["addition_embed_type"] != self.added_embedding or config["time_cond_proj_dim"] is not None:
            raise ValueError(
                f"unet: expected addition_embed_type {self.added_embedding} and no time_cond_proj_dim, got "
                f"{config['addition_embed_type']} and {config['time_cond_proj_dim']}: a model of another kind"
            )
        self.latent_shape = (config["in_channels"], self.height // self.vae_scale, self.width // self.vae_scale)
        if type(self.scheduler).__name__ == "PNDMScheduler":
            from diffusers import DDIMScheduler

            self.scheduler, self.sampler = DDIMScheduler.from_config(self.scheduler.config), "DDIMScheduler"
        self.prediction = self.scheduler.config.get("prediction_type", "epsilon")
        alphas = getattr(self.scheduler, "alphas_cumprod", torch.ones(1)).double()
        # t of every training timestep, as float32 values
        self.levels = ((1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())).float()
        self._levels_on: dict[torch.device, Tensor] = {}

    @property
    def euler(self) -> bool:
        """Whether the scheduler is Euler's in x / alpha, whose steps are the same and whose ends are not."""
        return type(self.scheduler).__name__ == "EulerDiscreteScheduler"

    @property
    def end(self) -> float:
        """The last noise level: that of timestep 0 where the configuration leaves it there, as in SD 1.x, else 0."""
        config = self.scheduler.config
        stays = config["final_sigmas_type"] == "sigma_min" if self.euler else not config.get("set_alpha_to_one", True)
        return self.levels[0].item() if stays else 0.0

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, _ = pipeline.encode_prompt(prompts, device, 1, False)
        return {"embeds": embeds}

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {"embeds": torch.empty(rows, text_tokens, self.config["cross_attention_dim"])}

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale}

    def scaled(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return latents.float() / _norm(sigma).view(-1, *[1] * (latents.ndim - 1))

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        return {
            "sample": latents,
            "timestep": self.timestep(sigma),
            "encoder_hidden_states": prompts["embeds"],
        }

    def timestep(self, sigma: Tensor) -> Tensor:
        """Training timesteps [B] float32 of noise levels; between two of them, linear in t."""
        # copied once: a CUDA graph would have to read the host's memory at each replay
        if sigma.device not in self._levels_on:
            self._levels_on[sigma.device] = self.levels.to(sigma.device)
        levels = self._levels_on[sigma.device]
        above = torch.searchsorted(levels, sigma.contiguous()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + (sigma - low) / (high - low)).clamp(0, len(levels) - 1)

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        output, z = output.float(), latents.float()
        t = sigma.view(-1, *[1] * (z.ndim - 1))
        if self.prediction == "epsilon":
            return torch.as_tensor((output - z) / (1 - t))
        # v_prediction: output = alpha eps - sigma x0
        norm = _norm(t)
        return torch.as_tensor(output / norm + (2 * t - 1) * z / norm.square())

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        # where its spacing reaches the last timestep, Euler's scheduler begins at sigma_max eps, not at pure noise
        spacing = self.scheduler.config["timestep_spacing"]
        return noise * (sigmas[0] if self.euler and spacing != "leading" else _norm(sigmas[0]))

    def sigmas(self, num_steps: int) -> Tensor:
        kind, config = type(self.scheduler), self.scheduler.config
        singular = self.prediction == "epsilon" and config.get("rescale_betas_zero_snr")
        if self.prediction not in ("epsilon", "v_prediction") or singular:
            wanted = "v_prediction" if singular else "epsilon or v_prediction"
            raise ValueError(f"scheduler: expected prediction_type {wanted}, got {self.prediction}")
        for name in ("clip_sample", "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if config.get(name):
                raise ValueError(f"scheduler: {name} of {kind.__name__} is not supported, set it to false")
        for name, usual in (("interpolation_type", "linear"), ("timestep_type", "discrete")):
            if config.get(name, usual) != usual:
                raise ValueError(
                    f"scheduler: {name} {config[name]} of {kind.__name__} is not supported, set it to {usual}"
                )
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(num_steps)
        steps = scheduler.timesteps.long()
        ratio = config["num_train_timesteps"] // num_steps
        if not self.euler and not torch.equal(steps[:-1] - ratio, steps[1:]):
            spacing = config["timestep_spacing"]
            raise ValueError(f"scheduler: {num_steps} steps with timestep_spacing {spacing} are not equally far apart")
        return torch.cat([self.levels[steps], torch.tensor([self.end])])

    def grid(self, latents: Tensor) -> Tensor:
        return latents / _norm(torch.tensor(self.end)).item()


class StableDiffusionXL(StableDiffusion):
    """`StableDiffusionXLPipeline`, the base model."""

    pipeline_class = "StableDiffusionXLPipeline"
    parts = {
        **StableDiffusion.parts,
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
    }
    unused = ("feature_extractor", "image_encoder")
    added_embedding = "text_time"

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        self.zeros = bool(getattr(pipeline, "config", {}).get("force_zeros_for_empty_prompt", True))

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"embeds": embeds, "pooled": pooled}

    def negative(self, encoded: Prompts) -> Prompts:
        return {name: torch.zeros_like(tensor) for name, tensor in encoded.items()} if self.zeros else encoded

    def example(self, rows: int, text_tokens: int) -> Prompts:
        pooled = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
        return super().example(rows, text_tokens) | {"pooled": torch.empty(rows, pooled)}

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        # original size, corner of the crop, size: as the pipeline has them by default
        sizes = (self.height, self.width, 0, 0, self.height, self.width)
        columns = [torch.full((len(latents), 1), float(size), device=latents.device) for size in sizes]
        times = torch.cat(columns, dim=1).to(prompts["pooled"].dtype)
        added = {"text_embeds": prompts["pooled"], "time_ids": times}
        return super().inputs(latents, sigma, prompts, guidance_scale) | {"added_cond_kwargs": added}

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self.vae.get("latents_mean"), self.vae.get("latents_std")
        if mean is None or std is None:
            return super().decode(vae, latents)
        shape = (1, -1, 1, 1)
        scale = torch.tensor(std, device=latents.device).view(shape)
        shift = torch.tensor(mean, device=latents.device).view(shape)
        shifted = latents * scale / self.vae["scaling_factor"] + shift
        return torch.as_tensor(vae.decode(shifted.to(vae.dtype)).sample)


def _norm(sigma: Tensor) -> Tensor:
    """sqrt((1 - t)^2 + t^2), which is 1 / (alpha + sigma)."""
    return ((1 - sigma).square() + sigma.square()).sqrt()
