"""A warm process: it imports everything once and forks a child for each case that it reads, a JSON line each.

    {"do": "train", "arguments": [...], "fault": {"at": 3, "kind": "kill"}}

The reply is a line with the child's exit status (negative = the signal that ended it), what it printed, and whether it
had to be killed since it took too long.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 60.0
"""Seconds of computing after which a case hangs, and a tenth of the seconds on the clock: the machine may be busy."""
UNFORESEEN = 98
"""Status of a child from which an error escaped."""


def train(case: dict[str, Any]) -> int:
    from densegrpo_fast.train import main

    return main(case["arguments"])


def sample(case: dict[str, Any]) -> int:
    from densegrpo_fast.sample import main

    return main(case["arguments"])


def evaluate(case: dict[str, Any]) -> int:
    from densegrpo_fast.evaluate import main

    return main(case["arguments"])


def read(case: dict[str, Any]) -> int:
    """Read files by the function of their kind: 0 = something sound came of it, 2 = it was refused in words."""
    from densegrpo_fast.calibration.store import read_calibration
    from densegrpo_fast.common.errors import UserError
    from densegrpo_fast.config.cli import load_config
    from densegrpo_fast.models.adapter_formats import read_lora
    from densegrpo_fast.run_files.images import read_picture
    from densegrpo_fast.run_files.metrics import read_metrics
    from densegrpo_fast.training.prompts import load_prompts

    reader: Callable[[Path], Any] = {
        "calibration": read_calibration,
        "configuration": load_config,
        "adapter": read_lora,
        "picture": read_picture,
        "metrics": read_metrics,
        "prompts": load_prompts,
    }[case["kind"]]
    refused = 0
    for name in case["files"]:
        try:
            found = reader(Path(name))
        except (UserError, ValueError, OSError) as error:
            assert str(error).strip(), "a refusal without words"
            refused += 1
            continue
        if case["kind"] == "adapter":
            assert all(tensor.isfinite().all() for tensor in found.values())
        if case["kind"] == "picture":
            assert found[0].ndim == 3 and 0 <= found[0].min() and found[0].max() <= 1
    return 2 if refused else 0


DOING = {"train": train, "sample": sample, "evaluate": evaluate, "read": read}


def arm(fault: dict[str, Any]) -> None:
    """Let something happen at the n-th time that the disk is waited for: a kill, a signal or a full disk."""
    fsync, count = os.fsync, 0

    def waiting(descriptor: int) -> None:
        nonlocal count
        count += 1
        if fault["kind"] == "full" and count >= fault["at"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)
        if count == fault["at"] and fault["kind"] != "full":
            os.kill(os.getpid(), fault["signal"])

    os.fsync = waiting


def child(case: dict[str, Any], output: int) -> int:
    os.dup2(output, 1)
    os.dup2(output, 2)
    # the streams of the parent may hold what it has not written yet
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    if "fault" in case:
        arm(case["fault"])
    try:
        status = DOING[case["do"]](case)
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = UNFORESEEN
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def computed(pid: int) -> float:
    """Seconds that a process has computed for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os._exit(child(case, output.fileno()))
        started, hung, status = time.monotonic(), False, None
        while status is None:
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(raw)
            elif not hung and (computed(pid) > LONGEST or time.monotonic() - started > 10 * LONGEST):
                hung = True
                os.killpg(pid, signal.SIGKILL)
            else:
                time.sleep(0.01)
        output.seek(0)
        return {"status": status, "output": output.read().decode("utf-8", "replace"), "hung": hung}


def main() -> None:
    import torch

    # a forked child cannot use the threads of its parent
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import densegrpo_fast.models.adapter_formats
    import densegrpo_fast.run_files.report
    import densegrpo_fast.training.pictures
    import densegrpo_fast.training.trainer  # noqa: F401
    from densegrpo_fast.models.tiny import tiny_sd3

    tiny_sd3()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
