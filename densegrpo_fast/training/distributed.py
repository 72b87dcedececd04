"""One run on several processes: who holds which rows, and what they tell each other.

    torchrun --nproc-per-node 8 -m densegrpo_fast.train --config sd35_medium_pickscore

Every process runs the same program on its own rows of an iteration. Noise, prompts and drawn steps are functions of
the global row, rewards are gathered so that every process computes credit on all samples, and gradients are added up
once per update: no result depends on the number of processes beyond the order of summation. What is gathered and
reduced is counted (`Traffic`); docs/scaling.md has the closed forms.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from densegrpo_fast.common.errors import SetupError, UsageError, UserError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import base_fingerprint
from densegrpo_fast.rewards.base import Scores
from densegrpo_fast.training.prompts import PromptBatch

Result = TypeVar("Result")

_BUCKET = 2**26
"""Values of gradients that are added up together, at most."""


class LostProcess(SetupError):
    """Another process of the run has ended, or does not answer."""


def _lost(error: RuntimeError) -> LostProcess:
    reason = re.sub(r"^\[[^\]]*\] |\. .*", "", str(error).strip().partition("\n")[0])
    return LostProcess(
        "another process of the run has ended, or has not answered within distributed.timeout "
        f"({reason}); the checkpoints are kept: start again with --resume"
    )


def as_lost_process(error: Exception) -> Exception:
    """A `LostProcess` in place of what PyTorch's own collectives raise, such as FSDP2's; another error as it is."""
    collective = isinstance(error, dist.DistError) or re.match(r"\[[^\]]*\bgloo/", str(error))
    return _lost(error) if collective and isinstance(error, RuntimeError) else error


@contextmanager
def _together() -> Iterator[None]:
    """What a collective raises means that another process is lost."""
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from None


@dataclass
class Traffic:
    """Bytes of the tensors that this process has given to collectives since the last reset.

    Attributes:
        gathered: its own part of what was gathered; every other process receives as much from it.
        reduced: of what was added up or compared over all processes.
    """

    gathered: int = 0
    reduced: int = 0


class World:
    """The processes of a run; `World()` is a process by itself, which needs no process group.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        device: that collectives take their tensors from: the GPU with NCCL, the CPU with gloo.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank, self.size = rank, size
        self.device = torch.device("cpu") if device is None else device
        self.traffic = Traffic()

    @property
    def main(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def share(self, total: int, *, unit: int = 1, parts: int = 1, micro_batch: int | None = None) -> Share:
        """This process's share of some rows; where there are fewer than processes, some hold padding alone.

        Args:
            total: number of rows.
            unit: rows that stay together.
            parts: of the rows, in order, that are each shared out among all processes: updates of an iteration.
            micro_batch: rows per forward, at most; None = any number.

        Raises:
            UsageError: parts and units do not divide the rows.
        """
        if total % (parts * unit):
            raise UsageError(
                f"distributed.split: {total} rows do not make {parts} parts of whole groups of {unit}; expected rows, "
                "or other numbers of data.num_prompts and optimizer.updates_per_iteration"
            )
        units = total // parts // unit
        own = -(-units // self.size)
        size = own * unit if micro_batch is None else min(micro_batch, own * unit)
        if unit == 1 and -(-own // size) * -(-own // -(-own // size)) <= units:
            # as many forwards as there have to be, of equal size
            count = -(-own // size)
            size = -(-own // count)
            own = count * size
        else:
            size = next(rows for rows in range(size, 0, -1) if own * unit % rows == 0)
        first = torch.arange(self.size).mul(own).clamp(max=units - own)[:, None] + torch.arange(own)
        real = first >= torch.arange(self.size)[:, None] * own
        rows = (first[..., None] * unit + torch.arange(unit)).flatten(1)
        offsets = torch.arange(parts)[:, None] * (units * unit)
        return Share(
            self,
            (rows[:, None] + offsets).flatten(1),
            real.repeat_interleave(unit, dim=1)[:, None].expand(-1, parts, -1).flatten(1),
            size,
        )

    def gather(self, values: Tensor) -> Tensor:
        """[W, ...] what every process has, all of one shape and dtype, on the device of `values`."""
        if self.size == 1:
            return values[None]
        own = values.detach().to(self.device).contiguous()
        self.traffic.gathered += own.nbytes
        found = own.new_empty(self.size, *own.shape)
        with _together():
            dist.all_gather(list(found), own)
        return found.to(values.device)

    def broadcast(self, values: Tensor) -> Tensor:
        """What the main process has of a tensor, on the device of collectives; it is not counted.

        Args:
            values: the tensor; in the other processes one of its shape and dtype, which needs no data.
        """
        found = values.to(self.device) if self.main else torch.empty_like(values, device=self.device)
        found = found.contiguous()
        with _together():
            # not every backend knows every dtype
            dist.broadcast(found.flatten().view(torch.uint8), src=0)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """What the values of all processes add up to, the same bits in every process."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest of all processes', element by element."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        self.traffic.reduced += total.nbytes
        with _together():
            dist.all_reduce(total, op=operation)
        return total.to(values.device)

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        return number if self.size == 1 else self.max(torch.tensor(float(number), dtype=torch.float64)).item()

    def on_main(self, work: Callable[[], Result]) -> Result | None:
        """`work()` by the process that writes files; its result there, None elsewhere.

        Raises:
            UserError: raised by it, in every process.
        """
        result, error = None, None
        if self.main:
            try:
                result = work()
            except UserError as raised:
                error = raised
        if self.size > 1:
            error = self._from_main(error)
        if error is not None:
            raise error
        return result

    def from_main(self, work: Callable[[], Result]) -> Result:
        """`work()` by the process that writes files, and its result everywhere.

        Raises:
            UserError: as `on_main`.
        """
        result = self.on_main(work)
        return self._from_main(result)  # type: ignore[return-value]

    def collect(self, value: Result) -> list[Result]:
        """What every process has, any picklable thing, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(found, value)
        return found

    def _from_main(self, value: Result) -> Result:
        if self.size == 1:
            return value
        box = [value if self.main else None]
        with _together():
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Share:
    """Rows of a batch by process. All hold equally many: what is too much is padding, rows that another one owns.

    Attributes:
        world: the processes.
        table: [W, n] int64, the row of the whole batch at each place of each process.
        real: [W, n] bool, whether the process owns that row; each row has one owner.
        micro_batch: rows per forward, which divide n.
    """

    world: World
    table: Tensor
    real: Tensor
    micro_batch: int

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return len(self.order)

    @cached_property
    def rows(self) -> Tensor:
        """[n] int64, the rows that this process holds."""
        return self.table[self.world.rank]

    @cached_property
    def order(self) -> Tensor:
        """[total] int64, for each row of the whole batch its place in what the processes hold, one after another."""
        places = self.real.flatten().nonzero().flatten()
        return places[self.table.flatten()[places].argsort()]

    def samples(self, branches: int = 1) -> list[int]:
        """The samples that belong to the rows held, `branches` to each."""
        return (self.rows[:, None] * branches + torch.arange(branches)).flatten().tolist()

    def select(self, batch: PromptBatch, branches: int = 1) -> PromptBatch:
        """Of the prompts of all samples those of the samples held."""
        return batch if self.world.size == 1 else batch.select(self.samples(branches))

    def holds_blocks_of(self, size: int) -> bool:
        """Whether every process holds consecutive blocks of so many rows, each beginning at a multiple of it."""
        if self.table.shape[1] % size:
            return False
        blocks = self.table.unflatten(1, (-1, size))
        return bool((blocks[..., 0] % size == 0).all() and (blocks == blocks[..., :1] + torch.arange(size)).all())

    def owned(self, rows: slice) -> slice:
        """Those of some places of this process whose rows it owns, a slice; empty if they are padding."""
        places = self.real[self.world.rank, rows].nonzero().flatten().tolist()
        start = rows.start + places[0] if places else rows.start
        return slice(start, start + len(places))

    def gather(self, values: Tensor, dim: int = 0, branches: int = 1) -> Tensor:
        """What all rows of the batch have, in their order, of what those held by this process have.

        Args:
            values: `dim` has the rows held, with `branches` entries for each.
        """
        if self.world.size == 1:
            return values
        found = self.world.gather(values.movedim(dim, 0)).flatten(0, 1)
        places = (self.order[:, None] * branches + torch.arange(branches)).flatten()
        return found[places.to(found.device)].movedim(0, dim)

    def pick(self, values: Tensor, rows: Tensor) -> Tensor:
        """[m, ...] what some rows of the batch have, of what the rows held by this process have [n, ...].

        Each process gives as many as the one that owns most of them.
        """
        if self.world.size == 1:
            return values[rows]
        wanted = self.real & torch.isin(self.table, rows)
        places = wanted.int().argsort(dim=1, descending=True, stable=True)[:, : wanted.sum(1).max()]
        part = replace(self, table=self.table.gather(1, places), real=wanted.gather(1, places), micro_batch=1)
        return part.gather(values[places[self.world.rank].to(values.device)])

    def gather_scores(self, scores: Scores, branches: int = 1) -> Scores:
        """Scores [C * total * branches] of all rows, of those [C * n * branches] of the rows held, C for each."""
        if self.world.size == 1:
            return scores
        names = list(scores.per_reward)
        held = torch.stack([scores.values, *(scores.per_reward[name] for name in names)])
        whole = self.gather(held.view(len(held), -1, len(self.rows) * branches), dim=2, branches=branches)
        values, *per_reward = whole.flatten(1)
        return Scores(values, dict(zip(names, per_reward, strict=True)))

    def within(self, rows: slice) -> tuple[slice, Share]:
        """The share of some consecutive rows of the batch: places of this process with all that it owns of them."""
        inside = self.real & (self.table >= rows.start) & (self.table < rows.stop)
        spans = [(held.nonzero().min().item(), held.nonzero().max().item() + 1) for held in inside if held.any()]
        count = max(int(stop - start) for start, stop in spans)
        starts = inside.int().argmax(1).clamp(max=self.table.shape[1] - count)
        places = starts[:, None] + torch.arange(count)
        part = replace(
            self,
            table=self.table.gather(1, places),
            real=inside.gather(1, places),
            micro_batch=count,
        )
        first = int(starts[self.world.rank])
        return slice(first, first + count), part


def iteration_share(world: World, config: Config) -> Share:
    """The states of an iteration that this process samples and trains, as `distributed.split` says.

    Raises:
        UsageError: there are too many processes for them, or they cannot be split so.
    """
    samples, branches = config.data.num_prompts * config.sampler.group_size, config.sampler.branches or 1
    unit = config.sampler.group_size // branches if config.distributed.split == "groups" else 1
    parts = config.optimizer.updates_per_iteration
    units = samples // branches // parts // unit
    if units < world.size:
        what = "rows" if unit == 1 else f"groups of {unit} rows"
        raise UsageError(
            f"there are {world.size} processes for {units} {what}{' of each update' if parts > 1 else ''}: start at "
            f"most {units}, or set data.num_prompts, sampler.group_size or distributed.split so that there are more"
        )
    return world.share(
        samples // branches,
        unit=unit,
        parts=parts,
        micro_batch=config.sampler.micro_batch,
    )


def equal_weights(world: World, model: FlowModel) -> str:
    """See that all processes have loaded the same model.

    Returns:
        The fingerprint of its base.

    Raises:
        SetupError: base or adapter differ from one process to another; in every process.
    """
    base = base_fingerprint(model.network)
    digest = hashlib.sha256(base.encode())
    trained = model.trainable_parameters()
    if len(trained) == len(list(model.network.parameters())):
        trained = {}  # the fingerprint is of these, and a whole network takes long to read
    for name, parameter in trained.items():
        digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    found = world.gather(torch.tensor([*digest.digest()], dtype=torch.uint8))
    if different := (found != found[0]).any(1).nonzero().flatten().tolist():
        raise SetupError(
            f"process {different[0]} has loaded other weights than process 0: is model.path the same on every machine?"
        )
    return base


def add_up_gradients(world: World, parameters: Sequence[Tensor], totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up the gradients of all processes in place, and what their metrics add up to, by as few collectives as fit.

    A parameter that no process has a gradient of keeps none. Gradients that FSDP2 spreads over the processes it has
    added up in the backward: they are left as they are.

    Args:
        parameters: the same in every process.
        totals: name -> 0-d tensor, the same names in every process.

    Returns:
        The sums of `totals`.
    """
    if world.size == 1:
        return totals
    whole = [p for p in parameters if not (isinstance(p, DTensor) and p.device_mesh.size() > 1)]
    known = torch.tensor([float(p.grad is not None) for p in whole])
    numbers = torch.stack([*totals.values()])
    sums = world.sum(torch.cat([known.to(numbers), numbers]))
    present = sums[: len(whole)].tolist()
    buckets: list[list[Tensor]] = []
    for parameter in (p for p, has in zip(whole, present, strict=True) if has):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if not buckets or sum(t.numel() for t in buckets[-1]) + gradient.numel() > _BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    for bucket in buckets:
        flat = world.sum(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return dict(zip(totals, sums[len(whole) :], strict=True))
