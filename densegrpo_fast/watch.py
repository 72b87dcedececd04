"""Show a run in the browser while it goes on: `python -m densegrpo_fast.watch RUN`.

    python -m densegrpo_fast.watch runs/embedded_branched-0
    python -m densegrpo_fast.watch runs/embedded_branched-0 --port 9000

Serves the run's report, made of what is in its directory at the moment, at http://127.0.0.1:8642 to this machine alone.
It only reads, and the page renews itself when the run has gone on. To see it from elsewhere, forward the port:
`ssh -L 8642:127.0.0.1:8642 MACHINE`. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densegrpo_fast.common.command_line import command_parser
from densegrpo_fast.common.errors import OutputError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

HOST = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    with user_errors_exit():
        options = _parser().parse_args(arguments)
        print(f"reading {options.run} ...", flush=True)
        server = serve(options.run, options.port)
        print(f"http://{HOST}:{server.server_address[1]} shows {options.run}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.server_close()
        return int(ExitCode.OK)


def serve(run: Path, port: int) -> ThreadingHTTPServer:
    """A server of a run's live page, on the loopback interface; `serve_forever` starts it.

    Args:
        run: the run directory.
        port: 0 = any that is free.

    Raises:
        SetupError: there is no run; OutputError: the port cannot be had.
    """
    from densegrpo_fast.run_files.live import live_server
    from densegrpo_fast.run_files.run_data import read_run

    read_run(run)
    try:
        return live_server(run, HOST, port)
    except OSError as error:
        raise OutputError(f"--port: cannot listen on {HOST}:{port}: {error.strerror or error}") from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"expected a port in 0..65535, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("watch", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--port", type=_port, default=8642, help="to listen on; 0 = any that is free; default: 8642")
    return parser


if __name__ == "__main__":
    sys.exit(main())
