"""The live page of a run: a small server on the loopback interface that reads the run directory and nothing else."""

from __future__ import annotations

import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.run_files.report import render_report
from densegrpo_fast.run_files.run_data import read_run, version

logger = logging.getLogger(__name__)

_NAMES = ("127.0.0.1", "localhost", "[::1]")


class LivePage:
    """The page of a run as it is now; made anew only when a file of the run has changed.

    Args:
        run: the run directory.
    """

    def __init__(self, run: Path):
        self.run = run
        self._version, self._page, self._lock = "", b"", threading.Lock()

    def page(self) -> bytes:
        """The page. While a file cannot be read it is the one before.

        Raises:
            UserError, OSError: there is none before it.
        """
        with self._lock:
            now = version(self.run)
            if now != self._version:
                try:
                    self._page = render_report(read_run(self.run), live=now).encode("utf-8")
                    self._version = now
                except (UserError, OSError, ValueError):
                    # a file is being written, or gone
                    if not self._page:
                        raise
            return self._page


def live_server(run: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of a run's page at `/` and of its version at `/version`.

    A request that names another host is refused, so that no other page's script can read it.

    Raises:
        OSError: it cannot listen there.
    """
    live = LivePage(run)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if name not in _NAMES:
                self._reply(HTTPStatus.FORBIDDEN, b"this page is for this machine alone\n")
            elif self.path == "/version":
                self._reply(HTTPStatus.OK, version(run).encode("ascii"))
            elif self.path == "/favicon.ico":
                self._reply(HTTPStatus.NO_CONTENT, b"")
            elif self.path in ("/", "/index.html"):
                try:
                    self._reply(HTTPStatus.OK, live.page(), "text/html")
                except (UserError, OSError, ValueError) as error:
                    self._reply(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            else:
                self._reply(HTTPStatus.NOT_FOUND, b"there is / and /version\n")

        def _reply(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            logger.debug(format, *args)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server
