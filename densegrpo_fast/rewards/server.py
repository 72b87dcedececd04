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

served with `--reward image_reward.py:RewardComputer`, and asked by the trainer as

    --reward.terms '{remote: 1.0}' --reward.options '{remote: {url: "http://HOST:8000", token_env: TOKEN}}'

It listens on this machine alone unless told otherwise, and then should ask for a token. Only JSON and PNG are read.
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.pictures import decode_png
from densegrpo_fast.rewards.base import Reward, RewardMixture
from densegrpo_fast.rewards.registry import create

logger = logging.getLogger(__name__)

MAX_REQUEST = 256 * 2**20
"""Largest request in bytes."""
_PATIENCE = 60.0


class RewardServer(ThreadingHTTPServer):
    """Serves one reward; requests are read side by side and scored one after the other.

    Args:
        reward: what scores.
        name: its name, for `/health` and messages.
        host, port: where to listen; port 0 = any free one, see `url`.
        token: bearer token that a request must carry; None = none.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reward: Reward, name: str, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None):
        self.mixture, self.name, self.token = RewardMixture({name: (reward, 1.0)}), name, token
        self.scoring = threading.Lock()
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Address of the server."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server's."""
        logger.debug("connection with %s broke off", client_address, exc_info=True)


class _Refused(Exception):
    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = _PATIENCE
    _taken = False
    server_version, sys_version = "densegrpo-fast", ""

    def do_GET(self) -> None:
        self._answer("/health", lambda: {"status": "ok", "reward": self.server.name})

    def do_POST(self) -> None:
        self._answer("/score", self._score)

    def _answer(self, path: str, make: Any) -> None:
        try:
            self._check_token()
            if self.path.rstrip("/") != path:
                raise _Refused(404, f"expected {self.command} {path}")
            status, data = 200, make()
        except _Refused as refused:
            status, data = refused.status, {"error": str(refused)}
            self._discard()
        body = json.dumps(data, allow_nan=False).encode("ascii")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _check_token(self) -> None:
        expected = self.server.token
        given = self.headers.get("Authorization", "")
        if expected is not None and not hmac.compare_digest(given.encode(), f"Bearer {expected}".encode()):
            raise _Refused(401, "expected the server's bearer token")

    def _score(self) -> dict[str, Any]:
        images, prompts, metadata = _request(self._body())
        try:
            with self.server.scoring:
                scores = self.server.mixture(images, prompts, metadata).values
        except RewardError as error:
            logger.warning("%s", error)
            raise _Refused(500, str(error)) from None
        return {"scores": [None if np.isnan(score) else score for score in scores.tolist()]}

    def _body(self) -> Any:
        length = self._length()
        if length is None:
            raise _Refused(411, "expected a Content-Length")
        if length > MAX_REQUEST:
            raise _Refused(413, f"expected at most {MAX_REQUEST} bytes")
        self._taken = True
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise _Refused(400, "expected JSON") from None

    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None

    def _discard(self) -> None:
        """Read what is left of a refused request, within limits: a client that is still sending would not see why."""
        rest = 0 if self._taken else min(self._length() or 0, MAX_REQUEST)
        while rest > 0:
            part = len(self.rfile.read(min(rest, 2**16)))
            rest = rest - part if part else 0

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests go to the log at level debug instead of stderr."""
        logger.debug(format, *arguments)


def _request(data: Any) -> tuple[torch.Tensor, list[str], list[dict[str, Any]]]:
    """Images [N, 3, H, W] float in [0, 1], prompts and metadata of a request."""
    if not isinstance(data, dict):
        raise _Refused(400, "expected an object with images, prompts and metadata")
    images, prompts = _list(data, "images", str), _list(data, "prompts", str)
    metadata = _list({"metadata": [{} for _ in prompts], **data}, "metadata", dict)
    if not len(images) == len(prompts) == len(metadata) > 0:
        counts = f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata"
        raise _Refused(400, f"expected as many of each and at least one, got {counts}")
    pictures = []
    for number, text in enumerate(images):
        try:
            pictures.append(decode_png(text))
        except ValueError as error:
            raise _Refused(400, f"image {number}: {error}") from None
    if len({picture.shape for picture in pictures}) > 1:
        raise _Refused(400, "expected images of one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, prompts, metadata


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
    parser.add_argument("--token-env", help="environment variable with the bearer token that requests must carry")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    token = None if options.token_env is None else os.environ.get(options.token_env)
    if options.token_env is not None and not token:
        parser.error(f"--token-env: the environment variable {options.token_env} holds no token")
    try:
        reward = create(options.reward, **dict(options.option))
        server = RewardServer(reward, options.reward, host=options.host, port=options.port, token=token)
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
