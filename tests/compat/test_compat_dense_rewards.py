"""Dense rewards of a host's trajectories against serial Euler completions and against the package's own lookahead."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402

from densegrpo_fast.compat.dense_rewards import dense_rewards  # noqa: E402
from densegrpo_fast.compat.flow_grpo import (  # noqa: E402
    PerPromptStatTracker,
    keep_velocities,
    pipeline_with_logprob,
    pipeline_with_logprob_fast,
)
from densegrpo_fast.credit.dense import dense_advantages  # noqa: E402
from densegrpo_fast.flow.dynamics import coefficients  # noqa: E402
from densegrpo_fast.models.diffusers_model import DiffusersModel  # noqa: E402
from densegrpo_fast.models.tiny import tiny_sd3  # noqa: E402
from densegrpo_fast.sampling import plan as plans  # noqa: E402
from densegrpo_fast.sampling.lookahead import Lookahead  # noqa: E402
from densegrpo_fast.sampling.rollout import Trajectory  # noqa: E402

N, SCALE = 4, 3.0
PROMPTS = ["the moon", "a cat", "the moon", "a cat"]
ROWS = [{"row": row} for row in range(4)]


@pytest.fixture(scope="module")
def model() -> DiffusersModel:
    model = tiny_sd3()
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@pytest.fixture
def text(model: DiffusersModel) -> dict[str, Any]:
    """The prompts as a script encodes them."""
    with torch.no_grad():
        embeds, _, pooled, _ = model.pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=8)
        empty, _, empty_pooled, _ = model.pipeline.encode_prompt([""], None, None, max_sequence_length=8)
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": empty.repeat(4, 1, 1),
        "negative_pooled_prompt_embeds": empty_pooled.repeat(4, 1),
        "guidance_scale": SCALE,
    }


def reward_fn(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[dict[str, Any], dict]:
    """In the hosts' form: two rewards and their average, with something of the prompt and the metadata in it."""
    assert images.shape == (len(prompts), 3, 64, 64) and len(metadata) == len(prompts)
    red = images[:, 0].double().mean(dim=(1, 2)) + torch.tensor([len(prompt) for prompt in prompts])
    blue = images[:, 2].double().square().mean(dim=(1, 2)) + torch.tensor([row["row"] for row in metadata])
    return {"red": red.tolist(), "blue": blue, "avg": ((red + blue) / 2).tolist(), "groups": {"all": 1.0}}, {}


def sampled(model: DiffusersModel, text: dict[str, Any], fast: bool, **options: Any) -> dict[str, Any]:
    """A sampling call, and its results as a script stacks them."""
    function = pipeline_with_logprob_fast if fast else pipeline_with_logprob
    images, latents, log_probs, *timesteps = function(
        model.pipeline, **text, num_inference_steps=N, output_type="pt", **options
    )
    found = {"images": images, "latents": torch.stack(latents, dim=1), "log_probs": torch.stack(log_probs, dim=1)}
    if fast:
        found["timesteps"] = torch.stack(timesteps[0]).unsqueeze(0).repeat(4, 1)
    return found


def serial_rewards(
    model: DiffusersModel, text: dict[str, Any], latents: Tensor, images: Tensor, first: int
) -> dict[str, Tensor]:
    """Every state completed on its own by all remaining Euler steps of the host's loop."""
    prompts = tuple(value for value in text.values() if isinstance(value, Tensor))
    columns = []
    with torch.no_grad():
        for state in range(latents.shape[1] - 1):
            done = latents[:, state]
            grid = model.pipeline.scheduler.sigmas
            for step in range(first + state, N):
                t = model.pipeline.scheduler.timesteps[step]
                done = done + (grid[step + 1] - grid[step]) * host_sd3.guided(model.pipeline, done, t, prompts, SCALE)
            columns.append(reward_fn(host_sd3.images_of(model.pipeline, done), PROMPTS, ROWS)[0])
    columns.append(reward_fn(images, PROMPTS, ROWS)[0])
    return {
        name: torch.stack([torch.as_tensor(column[name]).float() for column in columns], dim=1)
        for name in ("red", "blue", "avg")
    }


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_exact_is_the_serial_completion(model: DiffusersModel, text: dict[str, Any]) -> None:
    done = sampled(model, text, fast=False)
    sigmas = model.pipeline.scheduler.sigmas
    dense = dense_rewards(model.pipeline, reward_fn, PROMPTS, ROWS, latents=done["latents"], **text)
    expected = serial_rewards(model, text, done["latents"], done["images"], 0)
    assert set(dense.scores) == {"red", "blue", "avg"}
    for name, values in expected.items():
        close(dense.scores[name], values)
    close(dense.gains, expected["avg"].diff(dim=1), 5e-5)
    assert dense.gains.shape == (4, N) and dense.gains.abs().max() > 1e-3
    # 4 first velocities and 3 + 2 + 1 further ones
    assert dense.evaluations == 4 + 6
    assert dense.missing == 0
    # what the script's training reads afterwards is untouched
    assert model.pipeline.scheduler.sigmas is sigmas and len(sigmas) == N + 1


def test_it_is_the_packages_own_lookahead(model: DiffusersModel, text: dict[str, Any]) -> None:
    """Same trajectory, same plan, guidance after the first velocity left out: two ways through the package."""
    with keep_velocities() as kept:
        done = sampled(model, text, fast=False)
    noise_free = coefficients(model.sigmas(N), 0.7, "flow_sde")
    trajectory = Trajectory(
        done["latents"].transpose(0, 1).contiguous(),
        kept[0].velocities,
        done["log_probs"].T,
        noise_free,
        model.encode(PROMPTS),
        SCALE,
        kept[0].guidance_terms,
    )
    for guidance in ("cond_only", "reuse"):
        lookahead = Lookahead(model, plans.nodes(N, [2]), guidance=guidance)
        images = lookahead.images(trajectory, lookahead.complete(trajectory), "full")
        expected = torch.stack([torch.tensor(reward_fn(state, PROMPTS, ROWS)[0]["avg"]) for state in images], dim=1)
        dense = dense_rewards(
            model.pipeline,
            reward_fn,
            PROMPTS,
            ROWS,
            latents=done["latents"],
            **text,
            kept=kept[0],
            plan="nodes",
            nodes=[2],
            guidance=guidance,
            chunk=3,
        )
        close(dense.rewards, expected.float())
        # the states 0 and 1 evaluate at step 2; all first velocities were kept
        assert dense.evaluations == 2


@pytest.mark.parametrize("known", ["images", "kept", "nothing"])
def test_a_window(model: DiffusersModel, text: dict[str, Any], known: str) -> None:
    random.seed(1)
    window = {"sde_window_size": 2, "sde_window_range": (1, 3), "sde_type": "cps"}
    with keep_velocities() as kept:
        done = sampled(model, text, fast=True, **window)
    assert done["latents"].shape[:2] == (4, 3)
    given = {"images": {"images": done["images"]}, "kept": {"kept": kept[0]}, "nothing": {}}[known]
    dense = dense_rewards(
        model.pipeline, reward_fn, PROMPTS, ROWS, latents=done["latents"], timesteps=done["timesteps"], **text, **given
    )
    close(dense.rewards, serial_rewards(model, text, done["latents"], done["images"], 1)["avg"])
    assert dense.gains.shape == (4, 2)
    # window [1, 3) of 4: completions evaluate at 2, 3 and at 3; first velocities twice; the end at 3 if it is unknown
    assert dense.evaluations == {"images": 3 + 2, "kept": 3, "nothing": 3 + 2 + 1}[known]


def test_rows_may_have_different_windows(model: DiffusersModel, text: dict[str, Any]) -> None:
    """What an epoch of several sampling calls looks like."""
    parts = []
    for start in (0, 2):
        window = {"sde_window_size": 1, "sde_window_range": (start, start + 1)}
        parts.append(sampled(model, text, fast=True, **window))
    alone = [
        dense_rewards(
            model.pipeline,
            reward_fn,
            PROMPTS,
            ROWS,
            latents=part["latents"],
            timesteps=part["timesteps"],
            images=part["images"],
            **text,
        )
        for part in parts
    ]
    mixed = {name: torch.cat([parts[0][name][:2], parts[1][name][2:]]) for name in parts[0]}
    order = torch.tensor([2, 0, 3, 1])
    reordered = {name: value[order] for name, value in text.items() if isinstance(value, Tensor)}
    dense = dense_rewards(
        model.pipeline,
        reward_fn,
        [PROMPTS[row] for row in order],
        [ROWS[row] for row in order],
        latents=mixed["latents"][order],
        timesteps=mixed["timesteps"][order],
        images=mixed["images"][order],
        **reordered,
        guidance_scale=SCALE,
    )
    expected = torch.cat([alone[0].gains[:2], alone[1].gains[2:]])[order]
    close(dense.gains, expected)


@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_are_the_trackers(model: DiffusersModel, text: dict[str, Any], global_std: bool) -> None:
    """Eq. 10 with `global_std` False; with True, over the deviation of a step's gains of all prompts."""
    done = sampled(model, text, fast=False)
    with ThreadPoolExecutor(2) as executor:
        dense = dense_rewards(
            model.pipeline,
            reward_fn,
            PROMPTS,
            ROWS,
            latents=list(done["latents"].unbind(1)),
            timesteps=list(model.pipeline.scheduler.timesteps),
            images=done["images"],
            tracker=PerPromptStatTracker(global_std),
            executor=executor,
            plan="one_step",
            **text,
        )
        advantages = dense.advantages
    # rows of a prompt are a group of the package's own credit, up to its clip
    groups = dense.rewards.view(2, 2, N + 1).transpose(0, 1)
    std = "global" if global_std else "group"
    expected = dense_advantages(groups, std=std, clip=None).values.transpose(0, 1).reshape(4, N)
    close(advantages, expected, 1e-4)
    assert advantages.abs().max() > 0.1
    scores, info = dense.result()
    assert info == {} and set(scores) == {"red", "blue", "avg", "gains"}
    assert torch.equal(scores["avg"], dense.rewards[:, -1]) and torch.equal(scores["gains"], dense.gains)


def test_missing_rewards_stay_out_of_the_statistics(model: DiffusersModel, text: dict[str, Any]) -> None:
    done = sampled(model, text, fast=False)
    calls = []

    def partly(images: Tensor, prompts: list[str], metadata: list[Any]) -> list[float | None]:
        calls.append(metadata)
        values = images.mean(dim=(1, 2, 3)).tolist()
        return [None, *values[1:]] if len(calls) == 2 else values

    dense = dense_rewards(
        model.pipeline, partly, PROMPTS, latents=done["latents"], tracker=PerPromptStatTracker(), **text
    )
    assert dense.rewards.isnan().nonzero().tolist() == [[0, 1]]
    assert dense.missing == pytest.approx(1 / (4 * (N + 1)))
    assert dense.gains.isnan().nonzero().tolist() == [[0, 0], [0, 1]]
    assert calls[0] == [{}] * 4
    # row 0 is out, so row 2 is alone with its prompt
    assert (dense.advantages[[0, 2]] == 0).all() and (dense.advantages[[1, 3]] != 0).any()


def test_another_decoder_serves_all_images(model: DiffusersModel, text: dict[str, Any]) -> None:
    done = sampled(model, text, fast=False)
    decoded = []

    def preview(latents: Tensor) -> Tensor:
        decoded.append(len(latents))
        return model.decode(latents, "preview")

    dense = dense_rewards(
        model.pipeline, reward_fn, PROMPTS, ROWS, latents=done["latents"], decoder=preview, plan="one_step", **text
    )
    assert decoded == [4] * (N + 1)
    end = reward_fn(model.decode(done["latents"][:, -1], "preview"), PROMPTS, ROWS)[0]["avg"]
    close(dense.rewards[:, -1], torch.tensor(end))


def test_without_guidance_no_negative_prompts_are_needed(model: DiffusersModel, text: dict[str, Any]) -> None:
    plain = {name: text[name] for name in ("prompt_embeds", "pooled_prompt_embeds")} | {"guidance_scale": 1.0}
    done = sampled(model, plain, fast=False)
    dense = dense_rewards(model.pipeline, reward_fn, PROMPTS, ROWS, latents=done["latents"], **plain)
    assert dense.rewards.isfinite().all() and dense.evaluations == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": torch.tensor([1.0, 2.0, 3.0, 4.0])}, r"timesteps \[1.0, 2.0, 3.0, 4.0\] are not consecutive"),
        ({"timesteps": torch.zeros(3)}, r"shape \[T\] or \[B, T\] = \[4, 4\], got \[3\]"),
        ({"latents": torch.zeros(4, 3, 16, 8, 8)}, "latents has 3 states, the scheduler 4 steps"),
        ({"latents": torch.zeros(4, 1, 16, 8, 8)}, "T >= 1 steps, got 1"),
        ({"images": torch.zeros(3, 3, 64, 64)}, r"images must have one entry per row of latents \(4\), got 3"),
        ({"images": [None] * 4}, 'sample with output_type="pt"'),
        ({"images": torch.zeros(4, 3, 64, 64), "decoder": print}, "cannot be compared with another decoder's"),
        ({"negative_prompt_embeds": None}, "a guidance_scale above 1 needs negative_prompt_embeds"),
        ({"guidance": "reuse"}, "sample inside compat.flow_grpo.keep_velocities"),
        ({"guidance": "some"}, "guidance must be one of full, cond_only, reuse"),
        ({"plan": "nodes", "nodes": [7]}, r"nodes must increase within 1..3 for 4 steps"),
        ({"plan": plans.exact(6)}, "the plan is for 6 steps, the scheduler is set to 4"),
        ({"chunk": 0}, "chunk must be at least 1 row"),
    ],
)
def test_mistakes_are_refused(
    model: DiffusersModel, text: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    model.pipeline.scheduler.set_timesteps(N)
    options = {"latents": torch.zeros(4, N + 1, 16, 8, 8), **text, **change}
    with pytest.raises(ValueError, match=message):
        dense_rewards(model.pipeline, reward_fn, PROMPTS, ROWS, **options)


def test_a_reward_function_must_return_what_is_credited(model: DiffusersModel, text: dict[str, Any]) -> None:
    done = sampled(model, text, fast=False)
    options = {"latents": done["latents"], "plan": "one_step", **text}
    dense = dense_rewards(model.pipeline, reward_fn, PROMPTS, ROWS, key="red", **options)
    assert torch.equal(dense.rewards, dense.scores["red"])
    with pytest.raises(ValueError, match="advantages need the tracker"):
        _ = dense.advantages
    for wrong, found in (("green", r"'red': 4, 'blue': 4"), ("groups", r"'groups': 1")):
        with pytest.raises(ValueError, match=f"must return 4 numbers as '{wrong}', .*{found}"):
            _ = dense_rewards(model.pipeline, reward_fn, PROMPTS, ROWS, key=wrong, **options).rewards
