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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from densegrpo_fast.common.errors import SetupError, UsageError, UserError
from densegrpo_fast.common.exit_codes import exit_code_of
from densegrpo_fast.common.fingerprint import differences
from densegrpo_fast.config import Config
from densegrpo_fast.run_files.provenance import versions
from densegrpo_fast.training.distributed import LostProcess, World

_FAILED = "densegrpo_fast/failed"
_GRACE_SECONDS = 10.0
"""How long a process may go on after another one has failed: it may be waiting for it, or working, and is ended."""
_POLL_SECONDS = 1.0


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
    ended = threading.Event()
    threading.Thread(target=_end_with_the_others, args=(store, ended), daemon=True).start()
    try:
        _compare(store, rank, size, config, backend)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield World(rank, size, device)
        ended.set()
        dist.destroy_process_group()
    except Exception as error:
        _fail(store, rank, size, error)


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
    store.set(f"densegrpo_fast/about/{rank}", json.dumps(own))
    try:
        about = [json.loads(store.get(f"densegrpo_fast/about/{other}")) for other in range(size)]
    except RuntimeError as error:
        raise LostProcess(f"not all {size} processes have come: {_first_line(error)}") from None
    for other, theirs in enumerate(about):
        where = f"process {other} on {theirs['host']} and process 0 on {about[0]['host']}"
        if theirs["settings"] != about[0]["settings"]:
            found = "; ".join(differences(about[0]["settings"], theirs["settings"]))
            raise UsageError(f"{where} have other settings: {found}")
        if theirs["versions"] != about[0]["versions"]:
            found = "; ".join(differences(about[0]["versions"], theirs["versions"]))
            raise SetupError(f"{where} have other versions: {found}")


def _fail(store: Any, rank: int, size: int, error: Exception) -> None:
    """Say why this process ends, unless another has said it of itself, and end it with the exit code of the first."""
    code = int(exit_code_of(error)) if isinstance(error, UserError) else 1
    own = json.dumps({"rank": rank, "code": code})
    try:
        first = store.compare_set(_FAILED, "", own).decode()
    except RuntimeError:  # the store was the first's
        first = own
    if first != own:
        code = json.loads(first)["code"]
    elif isinstance(error, UserError):
        print(f"error: {f'process {rank} of {size}: ' if rank else ''}{error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # an orderly end would wait for the others
    os._exit(code)


def _end_with_the_others(store: Any, ended: threading.Event) -> None:
    """End this process some time after another has failed, whatever it does until then."""
    while not ended.wait(_POLL_SECONDS):
        try:
            if store.check([_FAILED]):
                time.sleep(_GRACE_SECONDS)
                os._exit(json.loads(store.get(_FAILED))["code"])
        except RuntimeError:  # the store is gone, and with it the process that had it
            return


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
