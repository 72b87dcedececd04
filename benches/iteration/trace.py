"""How far one has to jump to read an iteration: its files, functions, depth of calls and changes of file.

    python -m benches.iteration.trace                                  one iteration of embedded_dense
    python -m benches.iteration.trace --config embedded_branched --warm
    python -m benches.iteration.trace --checkout ../old                the same of another revision, from f883293 on

The iteration is that of a dry run: one prompt, two samples, one micro-batch, and no check of the lookahead. It begins
with the prompts of the batch and ends with the update; building the model and writing the record are not in it. Without
`--warm` it is the first of the process, with what is only looked up once.

Counted are the Python functions of `densegrpo_fast` alone, generators and comprehensions as Python 3.11 calls them:

    files       that a function which is called lives in
    functions   that are called, each once
    depth       most of them that are open at a time
    changes     pairs of consecutive events, calls and returns in order on a thread, whose functions live in different
                files
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# advice about optional packages is none of a bench's business
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import contextlib
import io
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any, NamedTuple

BAR = {"files": 25, "changes": 300}
"""What an iteration of embedded_dense shall stay within."""

_SHOWN = 16
"""Changes of file that are listed."""
_FIRST = ("batch", "rows")
"""The function of prompts.py that gives an iteration its prompts; f883293 has the second name."""
_OUTSIDE = "build_held_out"
"""What the dry run of f883293 calls in between and is no part of an iteration."""


class Event(NamedTuple):
    """A call of a function, or a return from it."""

    is_call: bool
    code: CodeType


class Tracer:
    """Within the context, notes the events of one iteration.

    Attributes:
        events: in order, by thread.

    Args:
        package: folder of the package; everything else is left out.
    """

    def __init__(self, package: Path):
        self.events: dict[int, list[Event]] = defaultdict(list)
        self._package = f"{package}{os.sep}"
        self._active = False
        self._outside = 0

    def __enter__(self) -> Tracer:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(self._package):
            return
        is_call, file = event == "call", os.path.basename(code.co_filename)
        if not self._active:
            self._active = is_call and file == "prompts.py" and code.co_name in _FIRST
        if code.co_name == _OUTSIDE:
            self._outside += 1 if is_call else -1
        elif self._active and not self._outside:
            self.events[threading.get_ident()].append(Event(is_call, code))
        if code.co_qualname == "Learner.update" and not is_call:
            self._active = False


def count(threads: Sequence[Sequence[Event]]) -> dict[str, int]:
    """The four numbers of the module's description."""
    called = {_name(event.code) for events in threads for event in events if event.is_call}
    depth = 0
    for events in threads:
        open_now = 0
        for event in events:
            open_now += 1 if event.is_call else -1
            depth = max(depth, open_now)
    changes = sum(
        one.code.co_filename != other.code.co_filename for events in threads for one, other in pairwise(events)
    )
    return {
        "files": len({file for file, _, _ in called}),
        "functions": len(called),
        "depth": depth,
        "changes": changes,
    }


def _name(code: CodeType) -> tuple[str, int, str]:
    """What tells functions apart; a function within another is a new object in every call of that."""
    return code.co_filename, code.co_firstlineno, code.co_qualname


def trace(checkout: Path, preset: str, *, warm: bool) -> list[list[Event]]:
    """The events of an iteration of a revision, by thread; its package must not be imported yet.

    Args:
        checkout: folder of the revision.
        preset: or a file, of the iteration.
        warm: whether another iteration is run before.
    """
    sys.path.insert(0, str(checkout))
    from densegrpo_fast import train
    from densegrpo_fast.config import cli

    assert Path(train.__file__).parent == checkout / "densegrpo_fast", f"{train.__file__} is of another checkout"
    # until f883293 the command line was read by load_config
    read = getattr(cli, "parse_arguments", None) or cli.load_config
    config = read(["--config", preset])[0]
    if hasattr(config.lookahead, "monitor_every"):
        unchecked = config.lookahead.model_copy(update={"monitor_every": 0})
        config = config.model_copy(update={"lookahead": unchecked})
    with contextlib.redirect_stdout(io.StringIO()):
        if warm:
            train.dry_run(config)
        with Tracer(checkout / "densegrpo_fast") as tracer:
            train.dry_run(config)
    return list(tracer.events.values())


def listing(threads: Sequence[Sequence[Event]], package: Path) -> str:
    """A line for each file, those that changes lead into most often first, and the most frequent changes."""
    functions: dict[str, set[tuple[str, int, str]]] = defaultdict(set)
    calls, changes = Counter[str](), Counter[tuple[str, str]]()
    for events in threads:
        for event in events:
            functions[event.code.co_filename].add(_name(event.code))
            calls[event.code.co_filename] += event.is_call
        files = [event.code.co_filename for event in events]
        changes.update(pair for pair in pairwise(files) if pair[0] != pair[1])
    entered = {file: sum(count for (_, to), count in changes.items() if to == file) for file in functions}
    short = {file: Path(file).relative_to(package).as_posix() for file in functions}
    lines = [f"{'functions':>9} {'calls':>6} {'changes':>7}"]
    for file in sorted(functions, key=lambda file: -entered[file]):
        lines.append(f"{len(functions[file]):9} {calls[file]:6} {entered[file]:7}  {short[file]}")
    lines += [f"{number:24}  {short[a]} -> {short[b]}" for (a, b), number in changes.most_common(_SHOWN)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    here = Path(__file__).resolve().parents[2]
    add("--config", default="embedded_dense", help="preset or file; default: embedded_dense")
    add("--checkout", type=Path, default=here, help="of the revision; default: the one around this file")
    add("--warm", action="store_true", help="run an iteration before the one that is traced")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    threads = trace(checkout, options.config, warm=options.warm)
    print(listing(threads, checkout / "densegrpo_fast"))
    for name, number in count(threads).items():
        print(f"{name:10} {number:4}" + (f"  (bar: {BAR[name]})" if name in BAR else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
