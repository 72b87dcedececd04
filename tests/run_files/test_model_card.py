"""The model card: its example is run, its numbers are the run's, and it promises nothing that was not measured."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.lora import save_lora
from densegrpo_fast.run_files.model_card import BaseFacts, write_model_card
from densegrpo_fast.run_files.statistics import Interval
from densegrpo_fast.sampling.rollout import sample_ode
from densegrpo_fast.training.models import build_model

PROMPT = "a red circle to the left of a blue square"
CALL = {"guidance_scale": 2.0, "max_sequence_length": 0}
SD3 = {"pipeline": "StableDiffusion3Pipeline", "call": CALL, "scheduler": None}
CPU = BaseFacts(**SD3, has_t5=False, dtype="float32", device="cpu")
NAN = float("nan")


def config(*options: str) -> Config:
    return parse_arguments(["--evaluation.num_steps=2", "--evaluation.guidance_scale=2", *options])[0]


def card(directory: Path, settings: Config, base: BaseFacts = CPU, prompt: str = PROMPT, **changes: Any) -> str:
    """The text of a card in `directory/adapter`."""
    measured = {
        "before": {"reward": Interval(0.4, 0.35, 0.45), "jpeg": Interval(-2.0, NAN, NAN)},
        "after": {"reward": Interval(0.5, 0.45, 0.55), "jpeg": Interval(-1.0, NAN, NAN)},
        "change": {"reward": Interval(0.1, 0.02, 0.18), "jpeg": Interval(1.0, NAN, NAN)},
        "metrics": [{"iteration": n, "reward": 0.3 + n / 100} for n in range(1, 26)],
    }
    (directory / "adapter").mkdir(exist_ok=True)
    return write_model_card(
        directory / "adapter",
        settings,
        base=base,
        prompts=[prompt] * settings.evaluation.num_prompts,
        **{**measured, **changes},
    ).read_text()


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def code(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def test_the_example_runs_and_is_the_evaluated_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config("--lora.rank=2", "--lora.alpha=4", "--lora.targets=[attn.to_q, attn.to_out.0]")
    model = build_model(settings, torch.device("cpu"))
    for name, parameter in model.trainable_parameters().items():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    save_lora(model.network, tmp_path / "adapter", rank=2, alpha=4)
    example = code(card(tmp_path, settings))

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["image"].size == (64, 64) and (tmp_path / "picture.png").is_file()
    pipe, noise = names["pipe"], torch.randn(1, *model.latent_shape)
    assert pipe.get_active_adapters()
    # the same call from known noise is the picture that the evaluation draws
    (call,) = [
        node
        for node in ast.walk(ast.parse(example))
        if ast.unparse(node).startswith("pipe(") and isinstance(node, ast.Call)
    ]
    options = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    drawn = np.asarray(pipe(PROMPT, latents=noise.clone(), **options).images[0], dtype=np.float32) / 255
    latents = sample_ode(model, noise, model.encode([PROMPT]), model.sigmas(2), guidance_scale=2.0)
    expected = model.decode(latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(drawn - expected).max() < 2 / 255
    with model.reference():
        latents = sample_ode(model, noise, model.encode([PROMPT]), model.sigmas(2), guidance_scale=2.0)
    assert np.abs(drawn - model.decode(latents)[0].permute(1, 2, 0).numpy()).max() > 4 / 255


def test_the_example_names_what_a_large_model_needs(tmp_path: Path) -> None:
    settings = config(
        "--model.path=stabilityai/stable-diffusion-3.5-medium",
        "--model.revision=main",
        "--model.max_sequence_length=128",
        "--model.height=512",
        "--model.width=768",
    )
    base = BaseFacts(**SD3, has_t5=True, dtype="bfloat16", device="cuda")
    text = code(card(tmp_path, settings, base, prompt='it\'s "so"'))
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    loading = calls["StableDiffusion3Pipeline.from_pretrained"]
    assert ast.literal_eval(loading.args[0]) == settings.model.path
    assert {word.arg: ast.unparse(word.value) for word in loading.keywords} == {
        "dtype": "torch.bfloat16",
        "revision": "'main'",
    }
    drawing = {word.arg: ast.literal_eval(word.value) for word in calls["pipe"].keywords}
    assert drawing == {
        "num_inference_steps": 2,
        "guidance_scale": 2,
        "max_sequence_length": 0,
        "height": 512,
        "width": 768,
    }
    assert ast.literal_eval(calls["pipe"].args[0]) == 'it\'s "so"'
    assert "pipe.to('cuda')" in {ast.unparse(call) for call in calls.values()}


def test_a_prompt_with_a_fence_stays_in_the_example(tmp_path: Path) -> None:
    example = code(card(tmp_path, config(), prompt="a ```\nred``` circle"))
    words = [node.value for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Constant)]
    assert "a ` ` `\nred` ` ` circle" in words


def test_the_numbers(tmp_path: Path) -> None:
    text = card(tmp_path, config("--reward.terms={scenes: 1.0}", "--run.iterations=25"))
    assert f"# {tmp_path.name}\n" in text
    assert (
        "| reward (weighted sum, trained) | 0.400 [0.350, 0.450] | 0.500 [0.450, 0.550] | +0.100 [+0.020, +0.180] |"
        in text
    )
    assert "| jpeg (not trained) | -2.000 | -1.000 | +1.000 |" in text
    assert "The trained reward rose." in text
    # 25 iterations in parts of 3: the mean of 1..3 is 0.3 + 2 / 100
    assert "| 1-3 | 0.320 | - |" in text and "| 25 | 0.550 | - |" in text
    assert "| Lookahead | exact_but_last |" in text and "| LoRA rank, alpha | 16, 32 |" in text
    assert re.search(r"densegrpo-fast \S+ \(commit \S+\), torch \S+, diffusers \S+\.", text)
    assert "nan" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Interval(0.1, -0.02, 0.2), "no improvement of the trained reward is shown"),
        (Interval(0.1, NAN, NAN), "no improvement of the trained reward is shown"),
        (Interval(-0.1, -0.2, -0.02), "The trained reward fell."),
    ],
)
def test_it_claims_no_more_than_the_interval(tmp_path: Path, change: Interval, words: str) -> None:
    text = card(tmp_path, config(), change={"reward": change, "jpeg": change})
    assert words in text and "rose" not in text


def test_alarms_are_told(tmp_path: Path) -> None:
    metrics = [{"iteration": 1, "reward": 0.1}, {"iteration": 2, "reward": 0.1, "alarms": ["skipped_updates"]}]
    assert "Alarm `skipped_updates` in 1 of 2 iterations: updates were skipped" in card(
        tmp_path, config(), metrics=metrics
    )


def test_base_model_and_licence(tmp_path: Path) -> None:
    embedded = card(tmp_path, config())
    assert header(embedded)["license"] == "apache-2.0" and "base_model" not in header(embedded)
    hub = card(tmp_path, config("--model.path=someone/sd3"))
    assert header(hub)["base_model"] == "someone/sd3" and "license" not in header(hub)
    assert "The licence of the base model applies." in hub
    local = card(tmp_path, config(f"--model.path={tmp_path}"))
    assert "base_model" not in header(local)
    assert str(tmp_path.parent) not in local, "where a model lies on one machine is not for a card"
    assert {"lora"} <= set(header(local)["tags"]) and header(local)["library_name"] == "diffusers"


def test_a_name_with_a_bar_keeps_the_table(tmp_path: Path) -> None:
    values = {"a|b": Interval(0.0, NAN, NAN)}
    text = card(tmp_path, config(), before=values, after=values, change=values)
    assert "| a\\|b (not trained) | 0.000 | 0.000 | +0.000 |" in text


def test_another_family_is_called_as_its_pipeline_wants_it(tmp_path: Path) -> None:
    call = {"true_cfg_scale": 4.0, "negative_prompt": " "}
    base = BaseFacts("QwenImagePipeline", call, "DDIMScheduler", has_t5=False, dtype="float32", device="cpu")
    text = code(card(tmp_path, config("--model.path=Qwen/Qwen-Image"), base))
    assert "from diffusers import DDIMScheduler, QwenImagePipeline\n" in text and "tokenizer_3" not in text
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)\n" in text
    (drawn,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pipe"]
    assert {word.arg: ast.literal_eval(word.value) for word in drawn.keywords} == call | {"num_inference_steps": 2}
    # of a model that is no pipeline there is no example
    assert "```python" not in card(tmp_path, config(), replace(base, pipeline=None))
