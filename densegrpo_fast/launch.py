"""python -m densegrpo_fast.launch [--host flow_grpo] script.py args...: another codebase's script on our ops.

A host whose step is a function of the script itself (dance_grpo) has it replaced the moment it is defined.

The script runs unchanged, as `python script.py args...` would run it: same arguments, `__main__`, search path, exit
status and tracebacks. It also works below a launcher of processes: `torchrun ... -m densegrpo_fast.launch script.py`,
`accelerate launch -m densegrpo_fast.launch script.py`. Processes that the script forks or spawns by `multiprocessing`
(also torch's, and those of a `DataLoader`) are patched like the script. Other commands that it runs are not.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.common.exit_codes import user_errors_exit
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.compat.run_script import run

if TYPE_CHECKING:
    from densegrpo_fast.compat.patch import Patch


def main(argv: Sequence[str] | None = None) -> None:
    """Patch the host, then run the script in this process; returns when it has run to its end.

    Args:
        argv: arguments; default: those of the command line.

    Raises:
        SystemExit: a wrong option, a missing script or host; or the script's own.
    """
    options = _parser().parse_args(argv)
    with user_errors_exit():
        script = Path(os.path.abspath(options.script))
        if not script.exists():
            raise UsageError(f"can't open file {str(script)!r}: there is no such file")
        if not script.is_file():
            raise UsageError(f"{str(script)!r} is not a file; name the Python file to run")
        if options.host not in HOSTS:
            known = ", ".join(HOSTS)
            raise UsageError(
                f"--host: unknown host {options.host!r}, known are: {known}{did_you_mean(options.host, HOSTS)}",
            )
        if not getattr(sys.flags, "safe_path", False):
            # python -m has put the working directory there; python script.py puts the script's folder.
            sys.path[0] = str(script.parent)
        patch, given = _install(options)
    sys.argv = [options.script, *options.args]
    try:
        run(script, patch, options.host, given)
    finally:
        if not patch.messages and _is_first_rank():
            _say(f"nothing was replaced: the script imported none of the functions of {options.host}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m densegrpo_fast.launch",
        description="Run another codebase's training script with its sampler steps replaced by this package's ops.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="flow_grpo", help=f"the codebase: {', '.join(HOSTS)} (default: %(default)s)")
    parser.add_argument("--signature", metavar="VERSION", help="signature generation of its step (default: detect it)")
    parser.add_argument(
        "--rng",
        default="host",
        help="host: the script's own random numbers; philox: counters that do not depend on the device "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, help="of --rng philox (default: torch's seed)")
    parser.add_argument("--tracker", action="store_true", help="replace the advantage statistics, too")
    parser.add_argument(
        "--noise-levels",
        metavar="FILE.json",
        type=os.path.abspath,
        help="take each step's noise level from a file of densegrpo_fast.calibrate, not the script's one number",
    )
    parser.add_argument(
        "--fix",
        metavar="NAME",
        action="append",
        help="take away a flaw of the host, which is kept otherwise; can be repeated; an unknown name lists all",
    )
    parser.add_argument("script", help="the Python file to run; everything after it belongs to the script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    return parser


def _install(options: argparse.Namespace) -> tuple[Patch, dict[str, Any]]:
    """The host's patch, and the arguments of its `install` that the command line gives."""
    host = import_module(f"densegrpo_fast.compat.{options.host}")
    wanted = {
        "version": options.signature,
        "tracker": options.tracker,
        "noise_levels": options.noise_levels,
        "fixes": options.fix,
    }
    optional = dict(zip(wanted, ("--signature", "--tracker", "--noise-levels", "--fix"), strict=True))
    given = {name: value for name, value in wanted.items() if value}
    for name in given:
        if name not in inspect.signature(host.install).parameters:
            raise UsageError(f"{optional[name]} is no option of --host {options.host}")
    given |= {"rng": options.rng, "seed": options.seed}
    try:
        return host.install(say=_say if _is_first_rank() else lambda line: None, **given), given
    except ValueError as error:
        raise UsageError(str(error)) from error
    except host.CompatError as error:
        raise SetupError(str(error)) from error


def _is_first_rank() -> bool:
    """Whether this process speaks for all of a run."""
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    print(f"densegrpo_fast: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
