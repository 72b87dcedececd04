"""Several processes do what one does: whose rows are whose, and an iteration of two gloo processes against one's."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.fidelity.measure import measure
from densegrpo_fast.fidelity.target import analytic_target
from densegrpo_fast.fidelity.variants import Variant
from densegrpo_fast.objective.clip import METRICS
from densegrpo_fast.sampling.plan import exact
from densegrpo_fast.training.distributed import World, as_lost_process, iteration_share
from densegrpo_fast.training.meter import PHASES, Counts
from densegrpo_fast.training.pictures import PictureSampler, draw

sys.path.insert(0, str(Path(__file__).parent))

from worlds import alone, policy, together, train  # noqa: E402


class Pretended(World):
    """One of several processes, which knows what the others would give."""

    def __init__(self, rank: int, size: int, found: dict[int, Tensor]):
        super().__init__(rank, size)
        self.found = found

    def gather(self, values: Tensor) -> Tensor:
        self.found[self.rank] = values
        return torch.stack([self.found.get(rank, torch.zeros_like(values)) for rank in range(self.size)])


@given(st.data())
def test_every_row_has_one_owner_and_comes_back_in_its_place(data: st.DataObject) -> None:
    size, parts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    unit = data.draw(st.integers(1, 4))
    units = data.draw(st.integers(1, 20))
    total, branches = units * unit * parts, data.draw(st.integers(1, 3))
    micro_batch = data.draw(st.integers(1, units * unit).filter(lambda rows: units * unit % rows == 0))
    found: dict[int, Tensor] = {}
    shares = [
        Pretended(rank, size, found).share(total, unit=unit, parts=parts, micro_batch=micro_batch)
        for rank in range(size)
    ]
    samples = torch.arange(total * branches)
    first = data.draw(st.integers(0, total - 1))
    some = slice(first, data.draw(st.integers(first + 1, total)))
    for share in shares:
        count = len(share.rows)
        assert count % (parts * share.micro_batch) == 0 and share.micro_batch <= micro_batch
        # a part's places hold rows of that part alone
        assert (share.rows.view(parts, -1) // (total // parts) == torch.arange(parts)[:, None]).all()
        owned = [share.owned(slice(at, at + share.micro_batch)) for at in range(0, count, share.micro_batch)]
        marked = torch.cat([share.rows[rows] for rows in owned])
        assert marked.tolist() == share.rows[share.real[share.world.rank]].tolist()
        whole = share.gather(samples[share.samples(branches)][None], dim=1, branches=branches)
    assert whole.tolist() == [samples.tolist()]
    found.clear()
    for share in shares:
        places, part = share.within(some)
        assert part.rows.tolist() == share.rows[places].tolist()
        inside = part.gather(share.rows[places])
    assert inside.tolist() == list(range(some.start, some.stop))
    found.clear()
    wanted = torch.arange(0, total, 2)
    for share in shares:
        picked = share.pick(share.rows, wanted)
    assert picked.tolist() == wanted.tolist()


def test_one_process_holds_all_rows_as_they_are() -> None:
    share = World().share(12, parts=2, micro_batch=3)
    assert share.rows.tolist() == list(range(12)) and share.real.all() and share.micro_batch == 3
    values = torch.randn(12)
    assert share.gather(values) is values


def test_what_cannot_be_shared_out_is_refused() -> None:
    options = {"data.num_prompts": 2, "sampler.group_size": 4, "sampler.micro_batch": 4}
    config = load_config("embedded_dense", options)
    with pytest.raises(UsageError, match="9 processes for 8 rows: start at most 8"):
        iteration_share(World(0, 9), config)
    config = load_config("embedded_dense", options | {"distributed.split": "groups"})
    with pytest.raises(UsageError, match="3 processes for 2 groups of 4 rows"):
        iteration_share(World(0, 3), config)
    with pytest.raises(UsageError, match="distributed.split: 12 rows do not make 2 parts of whole groups of 4"):
        World(0, 2).share(12, unit=4, parts=2)


CASES: dict[str, dict[str, object]] = {
    "guided, with KL": {"sampler.guidance_scale": 3.0, "objective.kl_coef": 0.5, "ema.every": 1},
    "whole groups, watched": {
        "distributed.split": "groups",
        "data.num_prompts": 4,
        "sampler.group_size": 2,
        "lookahead.monitor_every": 1,
    },
    "rows of a group, watched": {"data.num_prompts": 1, "sampler.group_size": 8, "lookahead.monitor_every": 1},
    "streamed": {"optimizer.update": "streamed", "sampler.guidance_scale": 3.0, "objective.kl_coef": 0.5},
    "branches": {
        "credit.method": "branch",
        "sampler.branches": 2,
        "sampler.group_size": 8,
        "objective.kl_coef": 0.5,
        "sampler.guidance_scale": 3.0,
    },
    "sparse, two updates": {
        "credit.method": "sparse",
        "optimizer.updates_per_iteration": 2,
        "sampler.micro_batch": 1,
        "lookahead.chunk": 1,
    },
    "previews, drawn steps": {
        "lookahead.decoder": "preview",
        "objective.trained_steps": 2,
        "objective.step_sampling": "importance",
    },
    "states of others": {"credit.closeness": 1.0, "sampler.shared_noise": "true", "lookahead.chunk": 1},
    "all weights": {"model.train": "full", "sampler.guidance_scale": 3.0, "objective.kl_coef": 0.5, "ema.every": 1},
    "all weights, half precision": {"model.train": "full", "model.dtype": "bfloat16", "objective.kl_coef": 0.5},
    "padded": {"data.num_prompts": 3, "sampler.group_size": 3, "sampler.micro_batch": 1, "lookahead.chunk": 1},
}
SHARDED: dict[str, dict[str, object]] = {
    "spread": {
        "distributed.shard": "full",
        "sampler.guidance_scale": 3.0,
        "objective.kl_coef": 0.5,
        "lookahead.monitor_every": 1,
    },
    "all weights, spread": {
        "model.train": "full",
        "distributed.shard": "full",
        "sampler.guidance_scale": 3.0,
        "objective.kl_coef": 0.5,
        "ema.every": 1,
        "data.num_prompts": 3,
        "sampler.group_size": 3,
        "sampler.micro_batch": 1,
        "lookahead.chunk": 1,
    },
    "all weights, spread, half precision, streamed": {
        "model.train": "full",
        "model.dtype": "bfloat16",
        "distributed.shard": "hybrid",
        "optimizer.update": "streamed",
        "objective.kl_coef": 0.5,
    },
    "all weights, spread, branches": {
        "model.train": "full",
        "distributed.shard": "full",
        "credit.method": "branch",
        "sampler.branches": 2,
        "sampler.group_size": 8,
    },
    "spread, streamed": {"distributed.shard": "hybrid", "optimizer.update": "streamed", "objective.kl_coef": 0.5},
}
FIRST = ("latents", "velocities", "log_probs", "rewards", "completed", "scores", "advantages")


def check_equal(own: dict[str, Any], single: dict[str, Any], tolerance: float) -> None:
    for name in FIRST:
        assert (own[name] is None) == (single[name] is None), name
        if own[name] is not None:
            torch.testing.assert_close(own[name], single[name], rtol=0, atol=0, equal_nan=True, msg=name)
    for name, gradient in single["gradients"].items():
        assert (own["gradients"][name] - gradient).norm() <= tolerance * gradient.norm(), name


def cases(world: World) -> dict[str, dict[str, Any]]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return {name: train(world, options) for name, options in (CASES | SHARDED).items()}


def check_cases(size: int) -> None:
    ranks, single = together(size, cases), alone(cases)
    for name, expected in single.items():
        for found in ranks:
            check_equal(found[name], expected, 1e-5)
            for own, other in zip(found[name]["average"], expected["average"], strict=True):
                torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
            for key, weight in found[name]["weights"].items():
                assert torch.equal(weight, ranks[0][name]["weights"][key])
            own, other = found[name]["records"][0], expected["records"][0]
            for key in other:
                if key.split("/")[0] in ("reward", "rewards", "gain", "monitor", "ratio_deviation", "loss", "kl"):
                    assert own[key] == pytest.approx(other[key], rel=1e-5, abs=1e-7, nan_ok=True), key
            assert own["nfe/rollout"] >= other["nfe/rollout"]
            assert "data.num_prompts" in (CASES | SHARDED)[name] or own["nfe/update"] == other["nfe/update"]
            if name in SHARDED:
                assert found[name]["held"] < 0.7 * expected["held"]
        if name == "guided, with KL":
            check_traffic(size, ranks[0][name])


def check_traffic(size: int, found: dict[str, Any]) -> None:
    """The closed forms of docs/scaling.md, of one process: 8 samples with 4 completed states each."""
    rows, adapter = 8 // size, found["gradients"].values()
    values, metrics = sum(gradient.numel() for gradient in adapter), 1 + len(METRICS) - 1 + 3
    gathered, reduced = found["traffic"]
    # the latents, velocities and log-probabilities that the test itself has gathered
    states, latent = found["latents"].shape[0] + found["velocities"].shape[0], found["latents"][0, 0].numel()
    own = 4 * rows * (states * latent + found["log_probs"].shape[0])
    table = 8 * (len(PHASES) + 4)
    assert gathered - own - table == 4 * rows * 4 * 2
    assert reduced == 4 * (values + len(adapter) + metrics) + 4 + 8 * len(PHASES) * len(fields(Counts))


@pytest.mark.ci
def test_two_processes_do_what_one_does() -> None:
    check_cases(2)


@pytest.mark.slow
def test_four_processes_do_what_one_does() -> None:
    check_cases(4)


def ten_iterations(world: World, trained: str) -> dict[str, Any]:
    options = {"sampler.guidance_scale": 3.0, "optimizer.lr": 1e-3, "objective.kl_coef": 0.1, "model.train": trained}
    return train(world, options | {"distributed.shard": "full"}, 10, True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("trained", ["lora", "full"])
def test_weights_stay_together_over_iterations(size: int, trained: str) -> None:
    single = alone(ten_iterations, trained)["weights"]
    for found in together(size, ten_iterations, trained):
        for name, weight in single.items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-8, atol=1e-8)


def looked_at(world: World) -> dict[str, Tensor]:
    """Pictures that are drawn, and rewards of completions that are measured, of all rows in every process."""
    model = policy()
    rows = [("a red circle", 3), ("a blue square", 1), ("a red circle", 2)]
    drawn = draw(model, rows, PictureSampler("ode", 3, 1.0), 1, world)
    target = analytic_target(5)
    variant = Variant(exact(target.coefficients.num_steps), "cond_only", "full")
    return {
        "drawn": drawn,
        "measured": measure(target, [variant], range(1, 4), group_size=2, seed=0, world=world)[variant],
    }


@pytest.mark.ci
def test_pictures_and_measurements_are_shared_out_and_the_same() -> None:
    single = alone(looked_at)
    for found in together(2, looked_at):
        assert torch.equal(found["drawn"], single["drawn"])
        torch.testing.assert_close(found["measured"], single["measured"], rtol=1e-5, atol=1e-6)


def alone_in_a_sum(directory: Path, rank: int) -> None:
    """One of two processes ends, the other adds up by PyTorch's own collective until it notices."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    if rank == 1:
        os._exit(0)
    try:
        while True:
            dist.all_reduce(torch.ones(1))
    except Exception as error:
        (directory / "found").write_text(f"{type(as_lost_process(error)).__name__}: {as_lost_process(error)}")
        os._exit(0)


@pytest.mark.ci
def test_a_process_that_is_lost_in_a_collective_of_pytorch_s_own_is_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=alone_in_a_sum, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "found").read_text().startswith("LostProcess: another process of the run has ended")
    for other in (RuntimeError("shape mismatch"), ValueError("[/a/gloo/b.cc:1] as text")):
        assert as_lost_process(other) is other
