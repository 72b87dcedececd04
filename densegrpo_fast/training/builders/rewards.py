"""The rewards of a run, in training and in the held-out evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from densegrpo_fast.common.errors import RewardError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.rewards.base import Reward, RewardMixture
from densegrpo_fast.rewards.registry import create, resolve_alias


def build_reward(
    terms: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    made: RewardMixture | None = None,
) -> RewardMixture:
    """The weighted mixture of the named rewards.

    Args:
        terms: reward name -> weight.
        options: reward name -> its options, as in `reward.options`.
        made: a mixture whose rewards are taken over where the names agree, so that no model is loaded twice.

    Raises:
        UsageError: a name or an option is wrong; RewardError: what a reward needs is not here.
    """
    ready = {} if made is None else made.terms
    try:
        rewards = {name: ready[name][0] if name in ready else _create(name, options or {}) for name in terms}
        return RewardMixture({name: (rewards[name], weight) for name, weight in terms.items()})
    except ValueError as error:
        raise UsageError(f"reward.terms, reward.options: {error}") from None
    except torch.OutOfMemoryError:
        raise RewardError(
            f"reward.terms: the GPU has no memory for the networks of {', '.join(terms)}: score on the CPU "
            "(--reward.options='{NAME: {device: cpu}}'), in another process (remote), or end what else runs there",
        ) from None
    except (ImportError, OSError) as error:
        raise RewardError(f"reward.terms, reward.options: {error}") from None


def build_observer(config: Config, training: RewardMixture | None = None) -> RewardMixture:
    """The mixture for held-out evaluation: the training reward, and the observed ones beside it.

    Args:
        training: the mixture that the run trains with, whose rewards are shared; None = make all of them.
    """
    terms = config.reward.terms
    # a reward that is both trained and observed keeps its weight
    observed = {name: 0.0 for name in config.reward.observed if name not in terms}
    return build_reward(terms | observed, config.reward.options, training)


def _create(name: str, options: Mapping[str, Mapping[str, Any]]) -> Reward:
    kind, own = resolve_alias(name, options)
    return create(kind, **own)
