"""Every registered credit method: what it declares, and the invariants that none of them may break."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import PluginError
from densegrpo_fast.credit import registry
from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages, normalize_groups
from densegrpo_fast.credit.registry import CreditMethod
from densegrpo_fast.credit.return_to_go import returns_to_go
from densegrpo_fast.credit.value import state_rewards

METHODS = registry.names()
P, G, T = 2, 4, 4
OPTIONS = {
    "std": "group",
    "spread_floor": 0.0,
    "clip": 1e6,
    "normalize": "step",
    "discount": 0.9,
    "step_value": "gain",
    "terminal_coef": 1.0,
    "dense_coef": 0.5,
    "consistent": True,
    "balance": True,
    # the absolute term of VGPO is not relative to the group; its own tests are in test_credit_vgpo.py
    "absolute_coef": 0.0,
    "absolute_steps": 2,
    "window": 1,
    "alpha": 0.25,
    "similarity_floor": 1e-3,
    "granularities": [1, 2],
}
RELATIVE = [name for name in METHODS if name != "vgpo"]
"""Methods whose advantages are a comparison alone. VGPO multiplies one by a ratio of rewards, whose zero counts, and
adds a share of the rewards themselves."""
BRANCHED = [name for name in METHODS if registry.find(name).uses_branches]

seeds = st.integers(0, 2**20)
choices = st.fixed_dictionaries(
    {
        "std": st.sampled_from(["group", "global"]),
        "normalize": st.sampled_from(["step", "joint"]),
        "discount": st.sampled_from([0.0, 0.9, 1.0]),
        "step_value": st.sampled_from(["gain", "value", "return_to_go"]),
        "terminal_coef": st.sampled_from([0.0, 1.0]),
        "consistent": st.booleans(),
        "balance": st.booleans(),
        "window": st.sampled_from([1, 2, 4]),
        "alpha": st.sampled_from([0.0, 0.25, 1.0]),
    }
)
every_method = pytest.mark.parametrize("name", METHODS)
few = settings(deadline=None, max_examples=8)
more = settings(deadline=None, max_examples=20)


def evidence(seed: int, noisy: Sequence[bool] = (True,) * T) -> CreditInputs:
    """Random evidence, with positive rewards that spread by some thousands (the epsilon of 1e-4 is nothing to them)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rewards = 1e4 + 1e3 * draw(P, G, sum(noisy) + 1)
    steps = len(noisy)
    known = CreditInputs(
        rewards=rewards[..., -1],
        noisy=tuple(noisy),
        latents=draw(steps + 1, P * G, 3),
        velocities=draw(steps, P * G, 3),
        sigmas=torch.linspace(1, 0, steps + 1, dtype=torch.float64),
    )
    return rewarded(known, rewards)


def rewarded(known: CreditInputs, rewards: Tensor) -> CreditInputs:
    """The same trajectories with other lookahead rewards, which two completions of branches have as well."""
    branches = torch.stack([rewards[..., :-1], rewards[..., 1:]], dim=-1)[:, None]
    return replace(known, rewards=rewards[..., -1], lookahead_rewards=rewards, branch_rewards=branches)


def members(known: CreditInputs, chosen: list[int]) -> CreditInputs:
    """The evidence of some samples of every group, in this order."""

    def of_rows(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (P, G))[:, :, chosen].flatten(1, 2)

    assert known.lookahead_rewards is not None
    return replace(
        rewarded(known, known.lookahead_rewards[:, chosen]),
        latents=of_rows(known.latents),
        velocities=of_rows(known.velocities),
    )


def judged(name: str, known: CreditInputs, **changes: Any) -> Tensor:
    return registry.advantages(name, known, OPTIONS | changes).values


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_method
def test_declarations_are_the_functions_own(name: str) -> None:
    method = registry.find(name)
    signature = inspect.signature(method.function())
    taken = {key for key, entry in signature.parameters.items() if entry.kind != entry.VAR_KEYWORD}
    if name == "mixture":  # hands the rest on
        from densegrpo_fast.credit.mixture import mixed_advantages

        taken |= set(inspect.signature(mixed_advantages).parameters) - {"rewards", "step_values"}
    assert {*method.needs, *method.options, *registry.COMMON} == taken - {"epsilon"}


@every_method
@more
@given(seed=seeds, order=st.permutations(range(G)), options=choices)
def test_members_of_a_group_may_come_in_any_order(
    name: str, seed: int, order: list[int], options: dict[str, Any]
) -> None:
    known = evidence(seed)
    options |= {"absolute_coef": 1e-4}
    close(judged(name, members(known, order), **options), judged(name, known, **options)[:, order])


@pytest.mark.parametrize("name", RELATIVE)
@more
@given(seed=seeds, scale=st.floats(0.5, 50), shift=st.floats(-1e4, 1e4), options=choices)
def test_unit_and_zero_of_the_reward_do_not_matter(
    name: str, seed: int, scale: float, shift: float, options: dict[str, Any]
) -> None:
    known = evidence(seed)
    assert known.lookahead_rewards is not None
    other = rewarded(known, scale * known.lookahead_rewards + shift)
    close(judged(name, other, **options), judged(name, known, **options))


@few
@given(seed=seeds, scale=st.floats(0.5, 50))
def test_vgpo_keeps_the_unit_only(seed: int, scale: float) -> None:
    known = evidence(seed)
    assert known.lookahead_rewards is not None
    scaled = rewarded(known, scale * known.lookahead_rewards)
    close(judged("vgpo", scaled), judged("vgpo", known))
    # the zero counts: far above it Q hardly differs along a trajectory, and all weights go to 1
    moved = judged("vgpo", rewarded(known, known.lookahead_rewards + 1e4))
    assert (moved - judged("vgpo", known)).abs().max() > 1e-3
    # with k > 0 every early step's advantage grows by weight * k * Q, which is above 0
    grown = judged("vgpo", known, absolute_coef=1e-4) - judged("vgpo", known)
    assert (grown[..., :2] > 0).all() and not grown[..., 2:].any()


@every_method
@more
@given(seed=seeds, lost=st.integers(0, G - 1), options=choices)
def test_a_missing_sample_is_as_if_it_never_was(name: str, seed: int, lost: int, options: dict[str, Any]) -> None:
    known = evidence(seed)
    options |= {"absolute_coef": 1e-4}
    assert known.lookahead_rewards is not None
    rewards = known.lookahead_rewards.clone()
    rewards[:, lost] = torch.nan
    values = judged(name, rewarded(known, rewards), **options)
    others = [member for member in range(G) if member != lost]
    assert not values[:, lost].any()
    close(values[:, others], judged(name, members(known, others), **options))


@every_method
@few
@given(seed=seeds, member=st.integers(0, G - 1), state=st.integers(0, T))
def test_a_missing_reward_is_counted_and_spreads_no_further(name: str, seed: int, member: int, state: int) -> None:
    known = evidence(seed)
    assert known.lookahead_rewards is not None
    rewards = known.lookahead_rewards.clone()
    rewards[0, member, state] = torch.inf
    found = registry.advantages(name, rewarded(known, rewards), OPTIONS | {"balance": False})
    assert found.values.isfinite().all()
    close(found.values[1], judged(name, known, balance=False)[1])
    # the end reward is what every method uses; of an earlier one those without a lookahead know nothing
    if state == T:
        assert found.missing > 0 and not found.values[0, member, -1]
    elif not (registry.find(name).uses_lookahead or registry.find(name).uses_branches):
        close(found.values, judged(name, known))


@every_method
@pytest.mark.parametrize("std", ["group", "global"])
@few
@given(seed=seeds)
def test_equal_samples_get_equal_advantages(name: str, std: str, seed: int) -> None:
    """Every sample twice in its group, and rewards of 1, 2 or 3 alone: steps, samples and groups tie as well."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(1, 4, (P, G, T + 1), generator=generator).double()
    twice = members(rewarded(evidence(seed), rewards), [0, 1, 1, 0])
    values = judged(name, twice, std=std, absolute_coef=0.5)
    assert torch.equal(values, values[:, [3, 2, 1, 0]])


@every_method
@few
@given(seed=seeds)
def test_groups_without_spread_get_nothing(name: str, seed: int) -> None:
    known = evidence(seed)
    assert known.lookahead_rewards is not None
    rewards = known.lookahead_rewards.clone()
    rewards[1] = rewards[1, :1]
    for std in ("group", "global"):
        found = registry.advantages(name, rewarded(known, rewards), OPTIONS | {"std": std})
        assert not found.values[1].any() and found.values[0].any()
        assert found.zero_spread == pytest.approx(0.5)
    # over all steps together a group has no spread if its rewards rise alike from step to step, too
    rising = rewards.clone()
    rising[1] = 1e4 + 512 * torch.arange(T + 1)
    assert not judged(name, rewarded(known, rising), normalize="joint", discount=0.0)[1].any()
    assert not judged(name, known, spread_floor=1e9).any()


@pytest.mark.parametrize("name", RELATIVE)
@few
@given(seed=seeds)
def test_the_advantages_of_a_group_sum_to_nothing(name: str, seed: int) -> None:
    values = judged(name, evidence(seed)).double()
    close(values.sum((1, 2)), torch.zeros(P, dtype=torch.float64))
    if name != "coca":  # its second normalisation is over all steps together
        close(values.sum(1), torch.zeros(P, T, dtype=torch.float64))


@every_method
@few
@given(seed=seeds)
def test_the_clip_bounds_and_nothing_else(name: str, seed: int) -> None:
    free, bound = judged(name, evidence(seed)), judged(name, evidence(seed), clip=0.5)
    assert bound.abs().max() <= 0.5
    if name != "coca":  # clips before its second normalisation, too
        close(bound, free.clamp(-0.5, 0.5))


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("std", ["group", "global"])
@few
@given(seed=seeds, shift=st.floats(-1e4, 1e4))
def test_branches_are_compared_with_those_of_their_trunk(name: str, std: str, seed: int, shift: float) -> None:
    """Two trunks of each of two prompts are credited as one trunk of each of four is, whose properties are above."""
    known = evidence(seed)
    assert known.branch_rewards is not None
    rewards = known.branch_rewards.unflatten(2, (2, 2)).squeeze(1)  # [P, N, C, K, L]
    trunks = replace(known, branch_rewards=rewards)
    alone = replace(known, branch_rewards=rewards.flatten(0, 1)[:, None], rewards=known.rewards.view(2 * P, G // 2))
    values = judged(name, trunks, std=std)
    assert torch.equal(values.view(2 * P, G // 2, T), judged(name, alone, std=std))
    if std == "group":  # the global one is around the mean of all
        # the luck of the noise that a trunk starts from drops out
        moved = rewards.clone()
        moved[:, 1] += shift
        close(judged(name, replace(known, branch_rewards=moved)), values)


@every_method
@few
@given(seed=seeds, quiet=st.sets(st.integers(0, 5), min_size=1, max_size=4))
def test_steps_without_noise_are_not_judged(name: str, seed: int, quiet: set[int]) -> None:
    noisy = [step not in quiet for step in range(6)]
    known = evidence(seed, noisy)
    values = judged(name, known)
    assert list(values.shape) == [P, G, 6]
    assert not values[..., sorted(quiet)].any()
    if name == "coca":
        return  # shares out over the whole trajectory
    # the noisy steps are judged as those of a trajectory that has no others
    kept = list(known.steps)
    alone = replace(
        known,
        noisy=(True,) * len(kept),
        latents=known.latents[[*kept, 6]],
        velocities=known.velocities[kept],
        sigmas=known.sigmas[[*kept, 6]],
    )
    close(values[..., kept], judged(name, alone))


@few
@given(seed=seeds)
def test_gains_sum_to_what_the_trajectory_gained(seed: int) -> None:
    rewards = evidence(seed).lookahead_rewards
    assert rewards is not None
    gained = rewards[..., -1] - rewards[..., 0]
    torch.testing.assert_close(reward_gains(rewards).sum(-1), gained)
    torch.testing.assert_close(returns_to_go(rewards)[..., 0], gained)
    torch.testing.assert_close(returns_to_go(rewards, 0.0), reward_gains(rewards))
    torch.testing.assert_close(state_rewards(rewards)[..., -1], rewards[..., -1])


def test_mixture_has_dense_and_sparse_at_its_ends() -> None:
    known = evidence(3)
    close(judged("mixture", known, terminal_coef=0.0, dense_coef=1.0), judged("dense", known))
    close(judged("mixture", known, terminal_coef=1.0, dense_coef=0.0), judged("sparse", known))
    for step_value in ("value", "return_to_go"):
        mixed = judged("mixture", known, terminal_coef=0.0, dense_coef=2.0, step_value=step_value)
        close(mixed, 2 * judged(step_value, known))


SCOPES = {
    "sparse": "whole",
    "dense": "local",
    "value": "local",
    "return_to_go": "whole",
    "mixture": "whole",
    "turning_point": "whole",
    "vgpo": "whole",
    "coca": "whole",
    "branch": "local",
    "granular": "local",
}
"""By `OPTIONS`; `choices` have others."""


def around(known: CreditInputs, step: int, seed: int) -> CreditInputs:
    """Other rewards, some of them missing, of all samples' states but the two around a step."""
    rewards = evidence(seed).lookahead_rewards
    assert rewards is not None and known.lookahead_rewards is not None and known.branch_rewards is not None
    rewards[0, 0] = torch.nan
    rewards[..., step : step + 2] = known.lookahead_rewards[..., step : step + 2]
    return rewarded(known, rewards)


@every_method
def test_what_is_local(name: str) -> None:
    assert registry.find(name).scope(OPTIONS) == SCOPES[name]


@every_method
@more
@given(seed=seeds, other=seeds, step=st.integers(0, T - 1), options=choices)
def test_a_local_method_credits_a_step_by_the_two_states_around_it(
    name: str, seed: int, other: int, step: int, options: dict[str, Any]
) -> None:
    known = evidence(seed)
    if registry.find(name).scope(OPTIONS | options) == "local":
        changed = judged(name, around(known, step, other), **options)
        assert torch.equal(changed[..., step], judged(name, known, **options)[..., step])


@every_method
@more
@given(options=choices)
def test_a_whole_method_does_not(name: str, options: dict[str, Any]) -> None:
    """Some rewards, and a step of them, show it: else the method would be local with these options."""
    if registry.find(name).scope(OPTIONS | options) == "whole":
        assert any(
            not torch.equal(
                judged(name, around(known, step, seed + 100), **options)[..., step],
                judged(name, known, **options)[..., step],
            )
            for seed in range(5)
            for known in [evidence(seed)]
            for step in range(T - 1)
        )


def test_a_method_from_outside_is_whole_unless_it_says_otherwise() -> None:
    assert LATE.scope({}) == "whole"
    local = replace(LATE, local_with={"late": 1})
    assert (local.scope({"late": 1}), local.scope({"late": 2})) == ("local", "whole")
    with pytest.raises(ValueError, match="local_with has normalize, which is none of its options"):
        replace(LATE, local_with={"normalize": "step"})


def test_similarity_belongs_to_the_sample_of_its_row() -> None:
    # sigma 1 and velocity (-1, 0) from latents 0: the predicted clean latents are (1, 0); the final ones lie at 0, 60,
    # 90 and 180 degrees from it
    ends = torch.tensor([[2.0, 0.0], [1.0, 3**0.5], [0.0, 1.0], [-1.0, 0.0]])
    known = CreditInputs(
        rewards=torch.zeros(2, 2),
        noisy=(True,),
        latents=torch.stack([torch.zeros(4, 2), ends]),
        velocities=torch.tensor([-1.0, 0.0]).expand(1, 4, 2),
        sigmas=torch.tensor([1.0, 0.0]),
    )
    expected = torch.tensor([[[1.0, 1.0], [0.5, 1.0]], [[0.0, 1.0], [-1.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(known.similarity, expected)


# -- methods from outside


def weighed_gains(lookahead_rewards: Tensor, steps: tuple[int, ...], *, late: float, **spread: Any) -> Advantages:
    """Gains that count `late` times as much at the last judged step."""
    weights = torch.ones(len(steps)).double()
    weights[-1] = late
    found = normalize_groups(reward_gains(lookahead_rewards.double()), **spread)
    return replace(found, values=found.values * weights.float())


LATE = CreditMethod(weighed_gains, needs=("lookahead_rewards", "steps"), options=("late",))


@pytest.mark.usefixtures("registries")
def test_a_method_from_outside_is_one_registration() -> None:
    registry.register("late", LATE)
    known = evidence(5)
    assert known.lookahead_rewards is not None
    plain = dense_advantages(known.lookahead_rewards, clip=1e6).values
    close(judged("late", known, late=3.0), plain * torch.tensor([1.0, 1.0, 1.0, 3.0]))
    assert registry.find("late").uses_lookahead
    assert registry.names()[-1] == "late"
    for name in ("late", "dense", "a:b"):
        with pytest.raises(ValueError, match=f"must be new and without a colon, got '{name}'"):
            registry.register(name, LATE)


def test_a_method_from_a_file_needs_no_registration(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from densegrpo_fast.credit.registry import CreditMethod\n"
        "from densegrpo_fast.credit.sparse import sparse_advantages\n"
        "def flipped(rewards, num_steps, **spread):\n"
        "    return sparse_advantages(-rewards, num_steps, **spread)\n"
        "FLIPPED = CreditMethod(flipped, needs=('rewards', 'num_steps'))\n"
    )
    known = evidence(5)
    close(judged(f"{path}:FLIPPED", known), -judged("sparse", known))
    assert not registry.find(f"{path}:FLIPPED").uses_lookahead
    with pytest.raises(ValueError, match=r"mine\.py:flipped: expected a CreditMethod"):
        registry.find(f"{path}:flipped")
    with pytest.raises(ValueError, match="holds no 'ABSENT'"):
        registry.find(f"{path}:ABSENT")
    with pytest.raises(ValueError, match="cannot load .*other.py: FileNotFoundError"):
        registry.find(f"{tmp_path / 'other.py'}:FLIPPED")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="broken.py: ZeroDivisionError"):
        registry.find(f"{tmp_path / 'broken.py'}:FLIPPED")
    with pytest.raises(ValueError, match="no_such_module: ModuleNotFoundError"):
        registry.find("no_such_module:FLIPPED")


def test_what_cannot_be_credited_is_refused() -> None:
    known = evidence(1)
    with pytest.raises(ValueError, match=r"unknown method 'dens' \(known: sparse, dense"):
        registry.find("dens")
    with pytest.raises(ValueError, match="dense needs lookahead_rewards, which this iteration does not have"):
        judged("dense", replace(known, lookahead_rewards=None))
    with pytest.raises(ValueError, match="dense needs the options clip, normalize"):
        registry.advantages("dense", known, {"std": "group", "spread_floor": 0.0})
    with pytest.raises(ValueError, match=r"needs must be some of rewards, .*, got \['reward'\]"):
        CreditMethod(weighed_gains, needs=("reward",))
    with pytest.raises(ValueError, match="plan 'one_step' is of no use without lookahead_rewards"):
        CreditMethod(weighed_gains, needs=("rewards",), plan="one_step")


@pytest.mark.usefixtures("registries")
def test_advantages_of_another_shape_are_refused() -> None:
    def short(rewards: Tensor, **spread: Any) -> Advantages:
        return normalize_groups(rewards[..., None], **spread)

    registry.register("short", CreditMethod(short, needs=("rewards",)))
    with pytest.raises(PluginError, match=r"short: expected advantages \[2, 4, 4\], got \[2, 4, 1\]"):
        judged("short", evidence(0))


def test_the_page_lists_the_methods_that_are_local_to_a_step() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8").replace("`", "")
    assert f" methods {registry.local_methods()}, if credit.smoothing" in " ".join(page.split())
