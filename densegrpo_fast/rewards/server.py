"""An HTTP server for any reward, the other end of `remote.py`.

    python -m densegrpo_fast.rewards.server --reward scenes --port 8000
    python -m densegrpo_fast.rewards.server --reward my_reward.py:score --option threshold=0.5

A reward whose package wants versions of its own gets an environment of its own, with this package beside it. For
ImageReward, say, `image_reward.py` is

    from PIL import Image
    from densegrpo_fast.common.pictures import to_bytes

    class Judge:
        def __init__(self, name: str = "ImageReward-v1.0"):
            import ImageReward
            self.model = ImageReward.load(name)

        def __call__(self, images, prompts, metadata):
            pictures = [Image.fromarray(picture) for picture in to_bytes(images)]
            return [self.model.score(prompt, picture) for prompt, picture in zip(prompts, pictures)]

served with `--reward image_reward.py:Judge`, and asked by the trainer as

    --reward.terms '{remote: 1.0}' --reward.options '{remote: {url: "http://HOST:8000", token_env: TOKEN}}'

It listens on this machine alone unless told otherwise, and then asks for a token. Only JSON and PNG are read. Requests
are bounded one by one and in total: a body has at most `MAX_REQUEST` bytes, its pictures at most `MAX_PIXELS` pixels,
`MAX_CONNECTIONS` are served at a time, their bodies take at most `MAX_WAITING` bytes, and one body at a time is decoded
and scored. A web page cannot send a request: it would say its origin, or that it sends no JSON.
"""

from __future__ import annotations

import argparse
import hmac
import io
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.pictures import decode_png, png_size
from densegrpo_fast.rewards.base import Reward, RewardMixture
from densegrpo_fast.rewards.http import DeadlineReader, remaining
from densegrpo_fast.rewards.registry import create

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

MAX_REQUEST = 64 * 2**20
"""Largest request in bytes."""
MAX_WAITING = 96 * 2**20
"""Bytes of all requests that are received or wait to be scored."""
MAX_PIXELS = 2**24
"""Pixels of all pictures of a request: 16 of 1024 x 1024."""
MAX_VALUES = 2**20
"""Brackets, braces, commas and quotes of a request, beside which text takes next to no memory once it is parsed."""
MAX_CONNECTIONS = 32
"""Connections that are served at a time; a further one is told to come again (503)."""
PATIENCE = 60.0
"""Seconds in which a request must be here, and for which it waits for room."""
_REFUSED = 2**20
"""Bytes of a refused request that are read, so that the client sees the answer."""


class RewardServer(ThreadingHTTPServer):
    """Serves one reward; requests are read side by side and scored one after the other.

    Args:
        reward: what scores.
        name: its name, for `/health` and messages.
        host, port: where to listen; port 0 = any free one, see `url`.
        token: bearer token that a request must carry; None = none, on this machine alone.
        timeout: seconds that a reward from outside of the package may take for a request; None = no limit.

    Raises:
        ValueError: other machines could reach it, and there is no token.
        OSError: it cannot listen there.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        name: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        timeout: float | None = None,
    ):
        if token is None and not _is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines, so a token is needed: give --token-env VARIABLE"
            )
        self.mixture, self.name, self.token = RewardMixture({name: (reward, 1.0)}, timeout), name, token
        self.scoring, self.room = threading.Lock(), _Room(MAX_WAITING)
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection on a thread of its own, if there are not too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.settimeout(1.0)
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, and let the next one in."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    @property
    def url(self) -> str:
        """Address of the server."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server's."""
        logger.debug("connection with %s broke off", client_address, exc_info=True)


class _Room:
    """So many bytes for all requests together."""

    def __init__(self, size: int):
        self._free, self._changed = size, threading.Condition()

    @contextmanager
    def taken(self, size: int, seconds: float) -> Iterator[None]:
        """Within the context, `size` bytes are taken.

        Raises:
            _Refused: they were not free within so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= size, seconds):
                raise _Refused(503, "the server is busy with other requests")
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def _is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return True  # it cannot be listened on either, and that error says more
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


class _Refused(Exception):
    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    _unread = 0
    server_version, sys_version = "densegrpo-fast", ""

    def setup(self) -> None:
        super().setup()
        self._rest = remaining(PATIENCE)
        self.rfile.close()
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, self._rest, MAX_REQUEST + 2**20))

    def do_GET(self) -> None:
        self._answer("/health", lambda: {"status": "ok", "reward": self.server.name})

    def do_POST(self) -> None:
        self._answer("/score", self._score)

    def _answer(self, path: str, make: Callable[[], dict[str, Any]]) -> None:
        self._unread = self._length() or 0
        try:
            self._check_sender()
            if self.path.rstrip("/") != path:
                raise _Refused(404, f"expected {self.command} {path}")
            status, data = 200, make()
        except _Refused as refused:
            status, data = refused.status, {"error": str(refused)}
            self._discard()
        except TimeoutError:
            status, data = 408, {"error": f"expected the whole request within {PATIENCE:g} s"}
        body = json.dumps(data, allow_nan=False).encode("ascii")
        # the time until the request was here is over; the answer has its own
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _check_sender(self) -> None:
        """Refuse a request without the token, or one that a web page could have sent."""
        expected = self.server.token
        given = self.headers.get("Authorization", "")
        if expected is not None and not hmac.compare_digest(given.encode(), f"Bearer {expected}".encode()):
            raise _Refused(401, "expected the server's bearer token")
        if self.headers.get("Origin") is not None:
            raise _Refused(403, "expected no Origin: web pages are not served")
        # a name that leads here and is not this machine's may be a web page's, too
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or "localhost"
        if expected is None and host != "localhost" and not _is_address_of_loopback(host):
            raise _Refused(403, f"expected a request for this machine, got one for {host[:100]!r}")

    def _score(self) -> dict[str, Any]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(415, "expected Content-Type: application/json")
        length = self._length()
        if length is None:
            raise _Refused(411, "expected a Content-Length")
        if length > MAX_REQUEST:
            raise _Refused(413, f"expected at most {MAX_REQUEST} bytes")
        with self.server.room.taken(length, self._rest()):
            self._unread = 0
            body = self.rfile.read(length)
            with self.server.scoring:
                try:
                    images, prompts, metadata = _request(body)
                    scores = self.server.mixture(images, prompts, metadata).values
                except RewardError as error:
                    logger.warning("%s", error)
                    raise _Refused(500, str(error)) from None
        return {"scores": [None if np.isnan(score) else score for score in scores.tolist()]}

    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None

    def _discard(self) -> None:
        """Read what is left of a refused request, within limits: a client that is still sending would not see why."""
        rest = min(self._unread, _REFUSED)
        with suppress(OSError):
            while rest > 0 and (part := len(self.rfile.read(min(rest, 2**16)))):
                rest -= part

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests go to the log at level debug instead of stderr."""
        logger.debug(format, *arguments)


def _is_address_of_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _request(body: bytes) -> tuple[torch.Tensor, list[str], list[dict[str, Any]]]:
    """Images [N, 3, H, W] float in [0, 1], prompts and metadata of a request."""
    if sum(body.count(mark) for mark in (b"[", b"{", b",", b'"')) > MAX_VALUES:
        raise _Refused(413, f"expected at most {MAX_VALUES} brackets, braces, commas and quotes")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refused(400, "expected JSON") from None
    if not isinstance(data, dict):
        raise _Refused(400, "expected an object with images, prompts and metadata")
    images, prompts = _list(data, "images", str), _list(data, "prompts", str)
    metadata = _list({"metadata": [{} for _ in prompts], **data}, "metadata", dict)
    if not len(images) == len(prompts) == len(metadata) > 0:
        counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
        raise _Refused(400, f"expected as many of each and at least one, got {counts}")
    sizes = [_told(number, png_size, text) for number, text in enumerate(images)]
    if sum(width * height for width, height in sizes) > MAX_PIXELS:
        raise _Refused(413, f"expected pictures of at most {MAX_PIXELS} pixels together; send fewer at a time")
    if len({*sizes}) > 1:
        raise _Refused(400, "expected images of one size")
    first = torch.from_numpy(_told(0, decode_png, images[0]).copy())
    pictures = torch.empty(len(images), 3, *first.shape[:2])
    for number, text in enumerate(images):
        decoded = first if number == 0 else torch.from_numpy(_told(number, decode_png, text).copy())
        pictures[number] = decoded.permute(2, 0, 1)
    return pictures.div_(255), prompts, metadata


def _told(number: int, read: Callable[[str], Read], text: str) -> Read:
    """What `read` makes of a picture, or its refusal with the picture's number."""
    try:
        return read(text)
    except ValueError as error:
        raise _Refused(400, f"image {number}: {error}") from None


def _list(data: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise _Refused(400, f"expected {key}, a list of {'objects' if kind is dict else 'texts'}")
    return value


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: serve a reward until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m densegrpo_fast.rewards.server", description="Serve a reward over HTTP (JSON and PNG)."
    )
    parser.add_argument("--reward", required=True, help="name of a reward, module:function or path.py:function")
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE", help="option of the reward"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 = any free one (default: 8000)")
    parser.add_argument(
        "--token-env",
        help="environment variable with the bearer token that requests must carry; needed where other machines can ask",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        help="seconds that a reward of your own may take for a request (default: 600)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    token = None if options.token_env is None else os.environ.get(options.token_env)
    if options.token_env is not None and not token:
        parser.error(f"--token-env: the environment variable {options.token_env} holds no token")
    try:
        reward = create(options.reward, **dict(options.option))
        server = RewardServer(
            reward, options.reward, host=options.host, port=options.port, token=token, timeout=options.timeout
        )
    except (ValueError, ImportError, OSError, OverflowError) as error:
        parser.error(str(error))
    with server:
        print(f"serving {options.reward} at {server.url}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
