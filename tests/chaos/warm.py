"""A warm process: it imports everything once and forks a child for each case that it reads, a JSON line each.

    {"do": "train", "arguments": [...], "fault": {"at": 3, "kind": "kill"}}

The reply is a line with the child's exit status (negative = the signal that ended it), what it printed, and whether it
had to be killed since it took too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
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
    """Read files by the function of their kind: 0 = something sound came of it, 2 = it was refused in words.

    With `same`, a file from before they were damaged, what is not refused must read as that one does.
    """
    import torch
    from diffusers import AutoencoderTiny

    from densegrpo_fast.calibration.store import read_calibration
    from densegrpo_fast.common.errors import UserError
    from densegrpo_fast.common.pretrained import load_network
    from densegrpo_fast.config.cli import load_config
    from densegrpo_fast.models.adapter_formats import read_lora
    from densegrpo_fast.models.prompt_cache import PromptCache
    from densegrpo_fast.run_files.images import read_picture
    from densegrpo_fast.run_files.metrics import read_metrics
    from densegrpo_fast.training.prompts import load_prompts

    def cached(path: Path) -> Any:
        found = PromptCache(path.parents[1], {}).find("a cat")
        if found is None:
            raise OSError("it is encoded again")
        return found

    reader: Callable[[Path], Any] = {
        "calibration": read_calibration,
        "configuration": load_config,
        "adapter": read_lora,
        "cache": cached,
        "picture": read_picture,
        "preview": lambda path: load_network(AutoencoderTiny, path.parent, torch.float32).state_dict(),
        "metrics": read_metrics,
        "prompts": load_prompts,
    }[case["kind"]]
    expected = reader(Path(case["same"])) if "same" in case else None
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
        if expected is not None and isinstance(expected, dict):
            assert {*found} == {*expected} and all(torch.equal(found[key], expected[key]) for key in expected), name
        elif expected is not None:
            assert found == expected, name
    return 2 if refused else 0


def adapters(case: dict[str, Any]) -> int:
    """Attach adapters as a command does, and compare the output with the one of the updates that they stand for."""
    import torch
    from safetensors.torch import load_file

    from densegrpo_fast.common.errors import UserError
    from densegrpo_fast.models.lora import attached_lora
    from densegrpo_fast.models.tiny import tiny_sd3
    from densegrpo_fast.run_files.model_refs import locate, read_weights

    @torch.no_grad()
    def output(model: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, *model.latent_shape, generator=generator)
        return model.velocity(latents, torch.tensor([0.3, 0.9]), model.encode(["a cat", "the moon"])).combined()

    for name, outcome in case["adapters"]:
        try:
            layers = read_weights(locate(name)).layers
            model = tiny_sd3()
            with attached_lora(model.network, layers):
                found = output(model)
        except (UserError, ValueError) as error:
            assert str(error).strip() and outcome != "sound", f"{name} was refused: {error}"
            continue
        assert outcome != "refused", f"{name} was taken"
        assert found.isfinite().all(), name
        if outcome == "sound":
            plain = tiny_sd3()
            for module, update in load_file(Path(name).with_suffix(".expected")).items():
                plain.network.get_submodule(module).weight.data += update
            torch.testing.assert_close(found, output(plain), rtol=2e-2, atol=2e-3)
    return 0


def models(case: dict[str, Any]) -> int:
    """Load pipeline directories and draw a picture by each."""
    import torch

    from densegrpo_fast.common.errors import UserError
    from densegrpo_fast.models.loading import load_pipeline

    @torch.no_grad()
    def picture(directory: str) -> torch.Tensor:
        device = torch.device("cpu")
        model = load_pipeline(directory, device=device, dtype=torch.float32, max_sequence_length=0)
        latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        velocity = model.velocity(latents, model.sigmas(4)[1].expand(1), model.encode(["a red circle"]), 2.0)
        return model.decode(latents - velocity.combined())

    expected = picture(case["original"])
    for name, outcome in case["models"]:
        try:
            found = picture(name)
        except UserError as error:
            assert str(error).strip() and outcome != "sound", f"{name} was refused: {error}"
            continue
        assert outcome != "refused", f"{name} was taken"
        if outcome == "sound":
            torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
        # what is not finite is refused where it is drawn: it must not look like a picture
        assert bool(found.isnan().any()) or bool(((found >= 0) & (found <= 1)).all()), name
    return 0


def serve(case: dict[str, Any]) -> int:
    """Send hostile requests to a reward server."""
    import wire

    return wire.serve(random.Random(case["seed"]), case["count"])


def ask(case: dict[str, Any]) -> int:
    """Ask servers that give hostile replies."""
    import wire

    return wire.ask(random.Random(case["seed"]), case["count"])


DOING = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "read": read,
    "adapters": adapters,
    "models": models,
    "serve": serve,
    "ask": ask,
}


def arm(fault: dict[str, Any]) -> None:
    """Let something happen: at the n-th time that the disk is waited for, or after so much computing."""
    if fault["kind"] == "clock":
        # nobody handles its signal, so the process is gone wherever it is
        signal.setitimer(signal.ITIMER_VIRTUAL, fault["after"])
        return
    if fault["kind"] == "limit":
        # every write that makes a file larger fails, as on a disk that fills up anywhere
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
        return
    if fault["kind"] == "mute":
        gone = os.open("/dev/full", os.O_WRONLY)
        if fault["how"] == "pipe":
            reader, gone = os.pipe()
            os.close(reader)
        for number in fault["streams"]:
            if fault["how"] == "closed":
                os.close(number)
            else:
                os.dup2(gone, number)
        return
    fsync, count = os.fsync, 0

    def waiting(descriptor: int) -> None:
        nonlocal count
        count += 1
        if fault["kind"] == "full" and count >= fault["at"]:
            raise OSError(fault["errno"], os.strerror(fault["errno"]))
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
    import densegrpo_fast.rewards.server
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
