"""python -m densegrpo_fast.launch [--host flow_grpo] script.py args...: another codebase's script on our ops.

A host whose step is a function of the script itself (dance_grpo) has it replaced the moment it is defined.

The script runs unchanged, as `python script.py args...` would run it: same arguments, `__main__`, search path, exit
status and tracebacks. `-m module` in its place runs a module, as `python -m module args...` would. Both also work below
a launcher of processes: `torchrun ... -m densegrpo_fast.launch script.py`, `accelerate launch -m densegrpo_fast.launch
script.py`. Processes that the script forks or spawns by `multiprocessing` (also torch's, and those of a `DataLoader`)
are patched like the script. Python commands that it runs, such as `accelerate launch -m module`, are patched when they
import the host; a step that such a command's own file defines is not replaced.
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
from densegrpo_fast.compat.run_script import Launched, is_first_rank, run, say, source_of

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
        if not options.module:
            script = _file(options.script)
        if options.host not in HOSTS:
            known = ", ".join(HOSTS)
            raise UsageError(
                f"--host: unknown host {options.host!r}, known are: {known}{did_you_mean(options.host, HOSTS)}",
            )
        if not getattr(sys.flags, "safe_path", False):
            # python script.py puts the script's folder there, python -m the working directory
            sys.path[0] = os.getcwd() if options.module else str(script.parent)
        patch, given = _install(options)
        module = None
        if options.module:
            try:
                module, path = source_of(options.script)
            except ImportError as error:
                raise UsageError(f"-m {options.script}: {error}") from error
            script = Path(path)
    from densegrpo_fast.compat.patch import CompatError  # loads torch, which --help does without

    sys.argv = [str(script) if options.module else options.script, *options.args]
    try:
        run(Launched(str(script), module, options.host, given), patch)
    finally:
        # an error that refuses the host says so itself
        if not patch.replaces and is_first_rank() and not isinstance(sys.exc_info()[1], CompatError):
            say(
                f"nothing was replaced in this process: the script imported none of the functions of {options.host}"
                f"{' that is known' if patch.messages else ''}; Python commands that it ran say what they replaced"
            )


def _file(path: str) -> Path:
    """A script's absolute path.

    Raises:
        UsageError: it is not a file.
    """
    script = Path(os.path.abspath(path))
    if not script.exists():
        raise UsageError(f"can't open file {str(script)!r}: there is no such file")
    if not script.is_file():
        raise UsageError(f"{str(script)!r} is not a file; name the Python file to run")
    return script


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
    parser.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does, not a file")
    parser.add_argument("script", help="the Python file or module to run; everything after it belongs to the script")
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
        return host.install(say=say if is_first_rank() else lambda line: None, **given), given
    except ValueError as error:
        raise UsageError(str(error)) from error
    except host.CompatError as error:
        raise SetupError(str(error)) from error


if __name__ == "__main__":
    main()
