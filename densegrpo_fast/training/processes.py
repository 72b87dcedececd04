"""The life of a run on several processes: they find each other, agree, and end together.

torchrun (or a script that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as under Slurm) starts them.
Whatever ends one ends all: the first to fail says why, in the store that they have in common, and the others end with
its exit code and without a word.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, words_and_code
from densegrpo_fast.common.fingerprint import flatten
from densegrpo_fast.config import Config
from densegrpo_fast.run_files.provenance import versions
from densegrpo_fast.training.distributed import LostProcess, World, as_lost_process

_PREFIX, _FAILED, _KNOWN = "densegrpo_fast", "failed", "known"
_GRACE_SECONDS = 10.0
"""How long a process may go on after another one has failed: it may be waiting for it, or working, and is ended."""
_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 3.0


@contextmanager
def joined(config: Config) -> Iterator[World]:
    """The world of this process: by itself, or with those that were started with it.

    An error inside ends all processes with its exit code, said by the one that had it first; this one does not return.

    Raises:
        SetupError: the others cannot be reached, differ in their versions or devices; UsageError: they have other
            settings. By a process by itself also whatever is raised inside.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    rank, local = _number("RANK"), _number("LOCAL_RANK", 0)
    if rank != 0:
        logging.getLogger().setLevel(logging.ERROR)
    timeout = timedelta(seconds=config.distributed.timeout)
    backend, device = _backend(config, local)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (ValueError, RuntimeError) as error:
        raise SetupError(
            f"the {size} processes cannot find each other: {_first_line(error)}; start them with torchrun, or set "
            "MASTER_ADDR and MASTER_PORT to where process 0 runs"
        ) from None
    # under torchrun the store outlives the processes, and those that it starts again have other addresses
    store = dist.PrefixStore(f"{_PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    failures = _Failures(store, rank, size)
    try:
        _compare(store, rank, size, config, backend)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield World(rank, size, device)
        failures.ended.set()
        dist.destroy_process_group()
    except Exception as error:
        failures.fail(as_lost_process(error))


def _number(variable: str, default: int | None = None) -> int:
    given = os.environ.get(variable)
    if given is None and default is not None:
        return default
    if given is None or not given.isdecimal():
        raise SetupError(f"{variable}: expected a number where WORLD_SIZE is set, got {given}; start with torchrun")
    return int(given)


def _backend(config: Config, local: int) -> tuple[str, torch.device]:
    """The backend of collectives, and the device of their tensors; a GPU is this process's from here on."""
    name, gpus = config.distributed.backend, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "nccl" and not gpus:
        raise SetupError("distributed.backend: nccl needs GPUs, and there is none; expected auto or gloo")
    if gpus:
        if local >= gpus:
            raise SetupError(
                f"process {local} of this machine has no GPU of its own: there are {gpus}; start at most so many "
                "processes here"
            )
        torch.cuda.set_device(local)
    if name == "gloo" or not gpus:
        return "gloo", torch.device("cpu")
    return "nccl", torch.device("cuda", local)


def _compare(store: Any, rank: int, size: int, config: Config, backend: str) -> None:
    """See that all processes have the same settings and versions.

    Raises:
        UserError: naming what differs; in every process.
    """
    own = {
        "host": socket.gethostname(),
        "settings": config.model_dump(mode="json"),
        "versions": versions() | {"backend": backend},
    }
    store.set(f"about/{rank}", json.dumps(own))
    try:
        about = [json.loads(store.get(f"about/{other}")) for other in range(size)]
    except RuntimeError as error:
        raise LostProcess(f"not all {size} processes have come: {_first_line(error)}") from None
    for other, theirs in enumerate(about):
        where = f"process {other} on {theirs['host']} and process 0 on {about[0]['host']}"
        if found := _differences(theirs["settings"], about[0]["settings"]):
            raise UsageError(f"{where} have other settings: {found}")
        if found := _differences(theirs["versions"], about[0]["versions"]):
            raise SetupError(f"{where} have other versions: {found}")


class _Failures:
    """What ends a run: the first process to fail leaves its exit code in the store, where the others look for it.

    Args:
        store: that all processes have in common; without torchrun it is gone with process 0.
        rank, size: of the world.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self.ended = threading.Event()
        self._code: int | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self, error: Exception) -> NoReturn:
        """Say why this process ends, unless another has failed before, and end it with the exit code of the first."""
        self.ended.set()
        words, status = words_and_code(error)
        code, first = int(status), self._code is None
        if first:
            own = json.dumps({"rank": self.rank, "code": code})
            try:
                found = self.store.compare_set(_FAILED, "", own).decode()
            except RuntimeError:  # the store is gone
                found = own
            code, first = json.loads(found)["code"], found == own
        else:
            code = self._code or code
        if first:
            print(f"error: {f'process {self.rank} of {self.size}: ' if self.rank else ''}{words}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self.rank == 0:
            self._wait_for_the_others()
        # an orderly end would wait for the others
        os._exit(code)

    def _wait_for_the_others(self) -> None:
        """Until they know: the store may end with this process."""
        for _ in range(int(_PATIENCE_SECONDS / _POLL_SECONDS)):
            try:
                if self.store.add(_KNOWN, 0) >= self.size - 1:
                    return
            except RuntimeError:
                return
            time.sleep(_POLL_SECONDS)

    def _watch(self) -> None:
        """End this process some time after another has failed, whatever it does until then."""
        while self._code is None:
            if self.ended.wait(_POLL_SECONDS):
                return
            try:
                if self.store.check([_FAILED]):
                    self._code = json.loads(self.store.get(_FAILED))["code"]
                    self.store.add(_KNOWN, 1)
            except RuntimeError:  # the store is gone, and with it the process that had it
                self._code = self._code or int(ExitCode.ENVIRONMENT)
        if not self.ended.wait(_GRACE_SECONDS):
            os._exit(self._code)


def _differences(own: dict[str, Any], other: dict[str, Any]) -> str:
    """The entries in which two processes differ."""
    first, second = flatten(own), flatten(other)
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    return "; ".join(f"{key} is {first.get(key)!r} and {second.get(key)!r}" for key in keys)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
