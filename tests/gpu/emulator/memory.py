"""Global and shared memory, checked byte by byte as compute-sanitizer does: bounds, alignment, first use, races."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from emulator.errors import Misaligned, OutOfBounds, Race, Uninitialised
from emulator.values import UNSIGNED, Array

_NOBODY, _MANY = -1, -2


class Threads(NamedTuple):
    """Who accesses memory: numbers in the whole grid, their blocks, and how many barriers each block has passed."""

    number: Array
    block: Array
    phase: Array

    def select(self, chosen: Array) -> Threads:
        """Some of them."""
        return Threads(self.number[chosen], self.block[chosen], self.phase[chosen])


class History:
    """Who wrote and who read each byte last, and after how many barriers of its block.

    A barrier orders the accesses of one block; nothing orders those of two blocks of a launch.

    Args:
        size: bytes.
        threads: per block.
    """

    def __init__(self, size: int, threads: int):
        self.threads = threads
        self.writer, self.reader, self.reading_block = (np.full(size, _NOBODY, np.int32) for _ in range(3))
        self.written, self.read_at = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def read(self, place: Array, by: Threads) -> bool:
        """Note that `by` [m] read the bytes `place` [m, n]; returns whether that was a race."""
        number, block, phase = (np.broadcast_to(each[:, None], place.shape) for each in by)
        writer = self.writer[place]
        ordered = (writer // self.threads == block) & (self.written[place] < phase)
        if np.any((writer != _NOBODY) & (writer != number) & ~ordered):
            return True
        reader, before = self.reader[place], self.reading_block[place]
        fresh = (reader == _NOBODY) | (reader == number) | ((before == block) & (self.read_at[place] < phase))
        self.reader[place] = number
        several = ~fresh | (self.reader[place] != number)
        self.reader[place[several]] = _MANY
        self.reading_block[place] = block
        mixed = ((before != _NOBODY) & (before != block)) | (self.reading_block[place] != block)
        self.reading_block[place[mixed]] = _MANY
        self.read_at[place] = phase
        return False

    def write(self, place: Array, by: Threads) -> bool:
        """Note that `by` [m] wrote the bytes `place` [m, n]; returns whether that was a race."""
        number, block, phase = (np.broadcast_to(each[:, None], place.shape) for each in by)
        writer, reader = self.writer[place], self.reader[place]
        after_write = (writer // self.threads == block) & (self.written[place] < phase)
        after_read = (self.reading_block[place] == block) & (self.read_at[place] < phase)
        self.writer[place] = number
        self.written[place] = phase
        return bool(
            np.any((writer != _NOBODY) & (writer != number) & ~after_write)
            or np.any((reader != _NOBODY) & (reader != number) & ~after_read)
            or np.any(self.writer[place] != number)
        )


class Region:
    """Some bytes of the host that a launch may touch.

    Args:
        base, size: where they are.
        name: for messages.
        defined: [size] bool, which bytes hold a value, kept up to date; None = all do.
    """

    def __init__(self, base: int, size: int, name: str, defined: Array | None = None):
        self.base, self.size, self.name, self.defined = base, size, name, defined
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        self.history: History | None = None
        self._reads: list[tuple[Array, int, Threads]] = []

    def forget(self) -> None:
        """A launch starts: what those before it did is done."""
        self.history = None
        self._reads.clear()

    def load(self, address: Array, step: int, count: int, by: Threads) -> list[Array]:
        """`count` words of `step` bytes from each address, as unsigned integers."""
        at = address.astype(np.int64) - self.base
        if self.defined is not None and not self.defined[_span(at, step * count)].all():
            raise Uninitialised(f"load of bytes of {self.name} that nobody has written")
        if self.history is None:
            # only what is written to as well can be a race: see `store`
            self._reads.append((at, step * count, by))
        elif self.history.read(_span(at, step * count), by):
            raise Race(f"load from {self.name} of what another thread stores, without a barrier between them")
        words = self._words(step)
        if words is not None and not np.any(at % step):
            first = at // step
            return [words[first + k] for k in range(count)]
        return [self.bytes[_span(at + k * step, step)].view(UNSIGNED[8 * step])[:, 0] for k in range(count)]

    def store(self, address: Array, step: int, values: list[Array], by: Threads, threads: int) -> None:
        """Words of `step` bytes one after another to each address, by threads in blocks of `threads`."""
        at = address.astype(np.int64) - self.base
        place = _span(at, step * len(values))
        if self.history is None:
            self.history = History(self.size, threads)
            for earlier, size, readers in self._reads:
                self.history.read(_span(earlier, size), readers)
            self._reads.clear()
        if self.history.write(place, by):
            raise Race(f"store to {self.name} where another thread stores or loads, without a barrier between them")
        if self.defined is not None:
            self.defined[place] = True
        words = np.stack([np.broadcast_to(value, len(at)) for value in values], axis=1)
        self.bytes[place] = np.ascontiguousarray(words).view(np.uint8).reshape(len(at), -1)

    def _words(self, step: int) -> Array | None:
        if self.base % step:
            return None
        return self.bytes[: self.size - self.size % step].view(UNSIGNED[8 * step])


def _span(at: Array, size: int) -> Array:
    """Places of the bytes of accesses, [m, size]."""
    return at[:, None] + np.arange(size)


class GlobalMemory:
    """The tensors that one launch was given, and nothing else.

    Args:
        regions: those that overlap become one.
        threads: per block.
    """

    def __init__(self, regions: list[Region], threads: int):
        self.regions: list[Region] = []
        for region in sorted((each for each in regions if each.size), key=lambda each: each.base):
            last = self.regions[-1] if self.regions else None
            if last is not None and region.base < last.base + last.size:
                size = max(last.size, region.base + region.size - last.base)
                defined = last.defined if size == last.size else None
                self.regions[-1] = Region(last.base, size, f"{last.name} and {region.name}", defined)
            else:
                self.regions.append(region)
        for region in self.regions:
            region.forget()
        self.threads = threads
        self._bases = np.array([region.base for region in self.regions], np.uint64)

    def load(self, address: Array, step: int, count: int, by: Threads) -> list[Array]:
        """`count` words of `step` bytes from each address [m].

        Raises:
            OutOfBounds, Misaligned, Uninitialised, Race
        """
        found = self._find(address, step * count, "load")
        if len(found) == 1:
            ((region, _),) = found
            return region.load(address, step, count, by)
        results = [np.empty(len(address), UNSIGNED[8 * step]) for _ in range(count)]
        for region, chosen in found:
            for result, part in zip(results, region.load(address[chosen], step, count, by.select(chosen)), strict=True):
                result[chosen] = part
        return results

    def store(self, address: Array, step: int, values: list[Array], by: Threads) -> None:
        """Words of `step` bytes one after another to each address [m]; raises as `load`."""
        for region, chosen in self._find(address, step * len(values), "store"):
            own = [np.broadcast_to(value, len(address))[chosen] for value in values]
            region.store(address[chosen], step, own, by.select(chosen), self.threads)

    def _find(self, address: Array, size: int, what: str) -> list[tuple[Region, Array]]:
        """Regions of all accesses, and which accesses are theirs."""
        if np.any(address % np.uint64(size)):
            raise Misaligned(f"{what} of {size} bytes at an address that is no multiple of {size}")
        number = np.searchsorted(self._bases, address, side="right") - 1
        found = []
        for k in np.unique(number):
            chosen = number == k
            region = self.regions[max(int(k), 0)]
            at = address[chosen].astype(np.int64) - region.base
            outside = (at < 0) | (at + size > region.size)
            if np.any(outside):
                first = int(at[outside][0])
                raise OutOfBounds(f"{what} of {size} bytes at byte {first} of {region.name}, which has {region.size}")
            found.append((region, chosen))
        return found


class SharedMemory:
    """Shared memory of some blocks, none of it written yet.

    Args:
        blocks: how many.
        size: bytes of each.
        threads: per block.
    """

    def __init__(self, blocks: int, size: int, threads: int):
        self.size = size
        self.bytes = np.zeros(blocks * size, np.uint8)
        self.defined = np.zeros(blocks * size, np.bool_)
        self.history = History(blocks * size, threads)

    def load(self, address: Array, step: int, count: int, by: Threads, first_block: int) -> list[Array]:
        """`count` words of `step` bytes from each address [m] of the threads' own blocks.

        Raises:
            OutOfBounds, Misaligned, Uninitialised, Race
        """
        place = self._place(address, step * count, by, first_block, "load")
        if not self.defined[place].all():
            raise Uninitialised("load of shared memory that nobody has written")
        if self.history.read(place, by):
            raise Race("load of shared memory that another thread stores, without a barrier between them")
        return [
            np.ascontiguousarray(self.bytes[place[:, k * step : (k + 1) * step]]).view(UNSIGNED[8 * step])[:, 0]
            for k in range(count)
        ]

    def store(self, address: Array, step: int, values: list[Array], by: Threads, first_block: int) -> None:
        """Words of `step` bytes one after another to each address [m]; raises as `load`."""
        place = self._place(address, step * len(values), by, first_block, "store")
        if self.history.write(place, by):
            raise Race("store to shared memory where another thread stores or loads, without a barrier between them")
        self.defined[place] = True
        words = np.stack([np.broadcast_to(value, len(address)) for value in values], axis=1)
        self.bytes[place] = np.ascontiguousarray(words).view(np.uint8).reshape(len(address), -1)

    def _place(self, address: Array, size: int, by: Threads, first_block: int, what: str) -> Array:
        if np.any(address % np.uint64(size)):
            raise Misaligned(f"{what} of {size} bytes of shared memory at an address that is no multiple of {size}")
        at = address.astype(np.int64)
        if np.any((at < 0) | (at + size > self.size)):
            raise OutOfBounds(f"{what} of {size} bytes at byte {int(at.max())} of {self.size} bytes of shared memory")
        return _span(at + (by.block - first_block) * self.size, size)
