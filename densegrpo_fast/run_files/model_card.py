"""The README.md of an adapter directory: what it is made for, how to use it, what it was measured to do."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densegrpo_fast import __version__
from densegrpo_fast.common.files import replace_text
from densegrpo_fast.config import Config
from densegrpo_fast.models.loading import is_hub_id
from densegrpo_fast.run_files.alarms import alarms_for
from densegrpo_fast.run_files.intervals import Interval
from densegrpo_fast.run_files.provenance import commit

_ROWS = 10
"""Rows of the training curve."""

_LIMITS = """\
A higher reward is what was optimised; that pictures are better in ways which it does not see was not measured. Only
prompts like those of the training were tried. Pictures, metrics and the report are in the run directory."""

_SETTINGS = (
    ("Credit", "credit.method"),
    ("Lookahead", "lookahead.plan"),
    ("Prompts per iteration", "data.num_prompts"),
    ("Samples per prompt", "sampler.group_size"),
    ("Denoising steps", "sampler.num_steps"),
    ("Dynamics", "sampler.dynamics"),
    ("Noise level", "sampler.noise_level"),
    ("Guidance scale", "sampler.guidance_scale"),
    ("Clip range", "objective.clip_range"),
    ("KL coefficient", "objective.kl_coef"),
    ("Learning rate", "optimizer.lr"),
    ("LoRA rank, alpha", "lora.rank lora.alpha"),
    ("Iterations", "run.iterations"),
    ("Seed", "seed"),
)


@dataclass(frozen=True)
class BaseFacts:
    """What the example must know of the base model.

    Attributes:
        has_t5: whether it comes with a T5 text encoder.
        dtype: of its weights, such as "bfloat16".
        device: where the run computed, "cpu" or "cuda".
    """

    has_t5: bool
    dtype: str
    device: str


def write_model_card(
    adapter: Path,
    config: Config,
    *,
    base: BaseFacts,
    prompt: str,
    before: Mapping[str, Interval],
    after: Mapping[str, Interval],
    change: Mapping[str, Interval],
    metrics: Sequence[Mapping[str, Any]],
) -> Path:
    """Write `README.md` beside the weights.

    Args:
        adapter: the adapter directory, inside its run directory, whose name is the title.
        config: the run's settings.
        base: of the model that the adapter belongs to.
        prompt: for the example.
        before, after, change: reward -> held-out mean before and after training, and the paired change.
        metrics: the run's records.

    Returns:
        The path written.

    Raises:
        OutputError: if it cannot be written.
    """
    own = ", ".join(f"{weight:g} x {name}" for name, weight in config.reward.terms.items())
    average = "running average of the trained weights" if config.ema.every else "trained weights"
    sections = (
        f"{_header(config)}# {_plain(adapter.resolve().parent.name)}",
        f"A LoRA for {_base_name(config)}, trained by reinforcement learning from the reward {_plain(own)} with\n"
        f"densegrpo-fast (DenseGRPO, arXiv 2601.20218). The weights are the {average}.",
        f"## Use\n\n```python\n{usage(config, base, prompt)}```",
        _held_out(config, before, after, change),
        _training(config, metrics),
        f"## Limits\n\n{_LIMITS}{_licence(config)}",
        f"densegrpo-fast {__version__} (commit {commit()}), torch {_version('torch')}, "
        f"diffusers {_version('diffusers')}.",
    )
    path = adapter / "README.md"
    replace_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def usage(config: Config, base: BaseFacts, prompt: str) -> str:
    """Python code that draws a picture as the held-out evaluation does; to be run in the run directory."""
    embedded = config.model.path == "embedded"
    imports = ["from diffusers import StableDiffusion3Pipeline"]
    arguments = [repr(_base_path(config))]
    if embedded:
        imports += ["", "from densegrpo_fast.embedded import WEIGHTS"]
        arguments = ["WEIGHTS"]
    if base.dtype != "float32":
        imports = ["import torch", *imports]
        arguments.append(f"dtype=torch.{base.dtype}")
    if config.model.revision is not None:
        arguments.append(f"revision={config.model.revision!r}")
    if not base.has_t5:
        arguments.append("text_encoder_3=None, tokenizer_3=None")
    draw = [
        repr(prompt),
        f"num_inference_steps={config.evaluation.num_steps}",
        f"guidance_scale={config.evaluation_guidance_scale:g}",
        f"max_sequence_length={config.model.max_sequence_length}",
    ]
    if config.model.height:
        draw.append(f"height={config.model.height}, width={config.model.width}")
    lines = [
        *imports,
        "",
        _call("pipe = StableDiffusion3Pipeline.from_pretrained", arguments),
        *([f'pipe.to("{base.device}")'] if base.device != "cpu" else []),
        'pipe.load_lora_weights("adapter")  # the directory of this file',
        _call("image = pipe", draw) + ".images[0]",
        'image.save("picture.png")',
    ]
    return "\n".join(lines).replace("```", "` ` `") + "\n"


def _call(function: str, arguments: list[str]) -> str:
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def _header(config: Config) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [lora, reinforcement-learning]"]
    if config.model.path == "embedded":
        lines.append("license: apache-2.0")
    elif is_hub_id(config.model.path):
        lines.append(f"base_model: {config.model.path}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _base_name(config: Config) -> str:
    if config.model.path == "embedded":
        return "the model embedded in densegrpo-fast"
    name = _base_path(config)
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(config.model.path) else name


def _base_path(config: Config) -> str:
    """The hub id, or the name of a local directory: where it lies on one machine helps nobody else."""
    return config.model.path if is_hub_id(config.model.path) else Path(config.model.path).name


def _licence(config: Config) -> str:
    return "" if config.model.path == "embedded" else " The licence of the base model applies."


def _held_out(
    config: Config, before: Mapping[str, Interval], after: Mapping[str, Interval], change: Mapping[str, Interval]
) -> str:
    options = config.evaluation
    lines = [
        "## Held-out prompts",
        "",
        f"{options.num_prompts} prompts x {options.samples_per_prompt} pictures from the same noise before and after, "
        f"{options.num_steps} noise-free steps, guidance {config.evaluation_guidance_scale:g}; 95% intervals.",
        "",
        "| reward | before | after | change |",
        "|---|---|---|---|",
    ]
    for name in after:
        cells = (_interval(before[name]), _interval(after[name]), _interval(change[name], "+.3f"))
        lines.append(f"| {' | '.join([_plain(name) + _role(config, name), *cells])} |")
    moved = change.get("reward")
    if moved is not None:
        verdict = (
            "The trained reward rose."
            if moved.low > 0
            else "The trained reward fell."
            if moved.high < 0
            else "The interval of the change holds 0 (or there is none): no improvement of the trained reward is shown."
        )
        lines += ["", verdict]
    return "\n".join(lines)


def _role(config: Config, name: str) -> str:
    if name == "reward":
        return " (weighted sum, trained)"
    return "" if config.reward.terms.get(name) else " (not trained)"


def _training(config: Config, metrics: Sequence[Mapping[str, Any]]) -> str:
    values = config.model_dump(mode="json")
    lines = ["## Training", "", "| setting | value |", "|---|---|"]
    for label, keys in _SETTINGS:
        found = ", ".join(str(_lookup(values, key)) for key in keys.split())
        if label != "Lookahead" or config.uses_lookahead or config.uses_branches:
            lines.append(f"| {label} | {_plain(found)} |")
    rows = _curve(metrics)
    if rows:
        lines += ["", "| iterations | training reward | held-out reward at the end |", "|---|---|---|", *rows]
    meaning = {alarm.name: alarm.meaning for alarm in alarms_for(config)}
    for name in dict.fromkeys(name for record in metrics for name in record.get("alarms", ())):
        count = sum(name in record.get("alarms", ()) for record in metrics)
        lines += ["", f"Alarm `{name}` in {count} of {len(metrics)} iterations: {meaning.get(name, '')}."]
    return "\n".join(lines)


def _curve(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """At most `_ROWS` rows: the mean training reward of as many iterations, and the evaluation among them if any."""
    rows = []
    size = max(1, -(-len(metrics) // _ROWS))
    for start in range(0, len(metrics), size):
        part = metrics[start : start + size]
        rewards = [record["reward"] for record in part if isinstance(record.get("reward"), float)]
        held_out = [record["eval/reward"] for record in part if isinstance(record.get("eval/reward"), float)]
        first, last = part[0].get("iteration", start + 1), part[-1].get("iteration", start + len(part))
        mean = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        span = str(first) if first == last else f"{first}-{last}"
        rows.append(f"| {span} | {mean} | {f'{held_out[-1]:.3f}' if held_out else '-'} |")
    return rows


def _interval(value: Interval, form: str = ".3f") -> str:
    if value.low != value.low:
        return format(value.mean, form)
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _plain(text: str) -> str:
    """Text that a table cell can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
