"""Where gains are made of previews, the final reward is still that of the full decoder, and missing by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import Trajectory
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.trainer import Trainer

Policy = Callable[..., FlowModel]

SETTINGS = {
    "data.num_prompts": 2,
    "sampler.group_size": 3,
    "sampler.num_steps": 4,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.micro_batch": 6,
    "window.schedule": "none",
    "window.size": "null",
    "lookahead.plan": "exact",
    "lookahead.decoder": "preview",
    "lookahead.chunk": 4,
    "reward.max_missing": 0.5,
}
ROWS = ["a cat"] * 3 + ["the moon"] * 3
STEPS = 4


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Different for any two pictures, and for the same picture under two prompts."""
    return images.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts])


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


def rewarded(config: Config, model: FlowModel, reward: Any = brightness) -> tuple[Trainer, Trajectory, RewardBatch]:
    """One rollout of `ROWS` with its rewards."""
    trainer = Trainer(config, model=model, reward=RewardMixture({"r": (reward, 1.0)}))
    batch = PromptBatch(ROWS, [{}] * len(ROWS), config.sampler.group_size)
    trajectory = trainer.sample(batch, trainer.schedule.at(0), 0)
    assert isinstance(trajectory, Trajectory)
    return trainer, trajectory, trainer.score(trajectory, trainer.complete(trajectory), batch)


def ends(model: FlowModel, trajectory: Trajectory, decoder: Decoder) -> Tensor:
    """Rewards [2, 3] of the final images, decoded one by one."""
    pictures = [model.decode(clean[None], decoder) for clean in trajectory.latents[-1]]
    return brightness(torch.cat(pictures), ROWS, []).view(2, 3)


@pytest.mark.ci
@pytest.mark.parametrize("overlap", ["true", "false"])
@pytest.mark.parametrize("shared", ["true", "false"])
def test_the_final_reward_is_the_full_decoders_and_gains_are_previews(
    tiny_policy: Policy, overlap: str, shared: str
) -> None:
    model = tiny_policy()
    config = configured(**{"reward.overlap": overlap, "sampler.shared_noise": shared})
    _, trajectory, outcome = rewarded(config, model)
    full, preview = ends(model, trajectory, "full"), ends(model, trajectory, "preview")
    assert (full - preview).abs().min() > 1e-3
    torch.testing.assert_close(outcome.rewards, full, rtol=1e-5, atol=1e-5)
    assert outcome.lookahead_rewards is not None and outcome.gains is not None
    torch.testing.assert_close(outcome.lookahead_rewards[..., -1], preview, rtol=1e-5, atol=1e-5)
    sums = outcome.lookahead_rewards[..., -1] - outcome.lookahead_rewards[..., 0]
    torch.testing.assert_close(outcome.gains.sum(-1), sums, rtol=1e-5, atol=1e-5)
    # every picture's score, the final ones' last
    assert outcome.scores.values.numel() == (STEPS + 2) * 6
    assert torch.equal(outcome.scores.values[-6:].view(2, 3), outcome.rewards)


def test_with_the_full_decoder_the_end_is_decoded_once(tiny_policy: Policy) -> None:
    _, _, outcome = rewarded(configured(**{"lookahead.decoder": "full"}), tiny_policy())
    assert outcome.scores.values.numel() == (STEPS + 1) * 6
    assert outcome.lookahead_rewards is not None
    assert torch.equal(outcome.lookahead_rewards[..., -1], outcome.rewards)


class Blind:
    """Brightness, but for the pictures of one call that it cannot judge."""

    def __init__(self, call: int, pictures: list[int]):
        self.call, self.pictures, self.calls = call, pictures, 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
        self.calls += 1
        blind = self.pictures if self.calls == self.call else []
        scores = brightness(images, prompts, metadata).tolist()
        return [None if number in blind else score for number, score in enumerate(scores)]


@pytest.mark.ci
def test_a_missing_final_reward_is_missing_where_it_is_used_alone(tiny_policy: Policy) -> None:
    """Without overlap the reward sees the previews in its first call, and the 6 final images in its second."""
    model = tiny_policy()
    trainer, trajectory, whole = rewarded(configured(), model)
    _, _, dense = rewarded(configured(), model, Blind(2, [1]))
    assert dense.rewards.isnan().nonzero().tolist() == [[0, 1]]
    assert dense.scores.missing_share == pytest.approx(1 / 36)
    # the gains know nothing of it
    assert torch.equal(trainer.credit(trajectory, dense).values, trainer.credit(trajectory, whole).values)
    mixing, trajectory, mixed = rewarded(configured(**{"credit.method": "mixture"}), model, Blind(2, [1]))
    advantages = mixing.credit(trajectory, mixed)
    assert not advantages.values[0, 1].any() and advantages.values[0, 0].all()
    assert advantages.missing == pytest.approx(1 / 6)


def test_a_missing_preview_of_the_end_leaves_the_final_reward(tiny_policy: Policy) -> None:
    model = tiny_policy()
    # of states 0..4 times 6 rows, the end of row 4
    _, _, found = rewarded(configured(), model, Blind(1, [4 * 6 + 4]))
    assert not found.rewards.isnan().any()
    assert found.gains is not None and found.gains.isnan().nonzero().tolist() == [[1, 1, STEPS - 1]]


def test_missing_final_rewards_count_towards_what_is_allowed(tiny_policy: Policy) -> None:
    with pytest.raises(UserError, match=r"17% of the scores are missing, reward.max_missing allows 10%"):
        rewarded(configured(**{"reward.max_missing": 0.1}), tiny_policy(), Blind(2, list(range(6))))
