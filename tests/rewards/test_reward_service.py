"""The reward server against whatever may be sent to it: limits in total, no exception, bounded memory."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densegrpo_fast.common.pictures import decode_png, encode_png
from densegrpo_fast.rewards import server as service
from densegrpo_fast.rewards.jpeg import JpegIncompressibility
from densegrpo_fast.rewards.server import RewardServer, main

sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))

from wire import chunk, plain, png  # noqa: E402

MEMORY = 10**9
"""Bytes of memory that the server may take, whatever is sent to it."""


@contextmanager
def served(server: RewardServer) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()


def posted(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the server's answer."""
    sent = urllib.request.Request(f"{url}/score", data=body, headers={"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(sent, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def request(**changes: Any) -> bytes:
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    return json.dumps({"images": [picture], "prompts": ["p"], "metadata": [{}]} | changes).encode()


@pytest.mark.parametrize(
    ("headers", "status", "problem"),
    [
        ({"Content-Type": "text/plain"}, 415, "expected Content-Type: application/json"),
        ({"Content-Type": "text/plain; x=application/json"}, 415, "expected Content-Type"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
        ({"Origin": "http://evil.example"}, 403, "expected no Origin"),
        ({"Origin": "null"}, 403, "expected no Origin"),
        ({"Host": "evil.example"}, 403, "got one for 'evil.example'"),
        ({"Host": "[::1]:80"}, 200, ""),
    ],
)
def test_what_a_web_page_could_send_is_refused(headers: dict[str, str], status: int, problem: str) -> None:
    with served(RewardServer(JpegIncompressibility(), "jpeg")) as url:
        found, reply = posted(url, request(), **headers)
    assert found == status and problem in reply.get("error", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_other_machines_need_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="so a token is needed: give --token-env"):
        RewardServer(JpegIncompressibility(), "jpeg", host=host)
    with pytest.raises(SystemExit) as stop:
        main(["--reward", "jpeg_compressibility", "--host", host, "--port", "0"])
    assert stop.value.code == 2 and "--token-env VARIABLE" in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    with RewardServer(JpegIncompressibility(), "jpeg", host="0.0.0.0", token="secret"):
        pass


def test_pixels_and_values_are_limited_together() -> None:
    large = [plain(2048, 2048)] * 5
    with served(RewardServer(JpegIncompressibility(), "jpeg")) as url:
        found, reply = posted(url, request(images=large, prompts=["p"] * 5, metadata=[{}] * 5))
        assert found == 413 and "at most 16777216 pixels together" in reply["error"]
        found, reply = posted(url, b'{"images": [' + b"[]," * 600_000 + b"[]]}")
        assert found == 413 and "brackets" in reply["error"]
        for images in (
            [plain(8, 8), plain(8, 9)],
            [png(8, 8, chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)))],
        ):
            assert (
                posted(url, request(images=images, prompts=["p"] * len(images), metadata=[{}] * len(images)))[0] == 400
            )


def test_bodies_and_connections_are_limited_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PATIENCE", 0.4)
    monkeypatch.setattr(service, "MAX_WAITING", 1000)
    monkeypatch.setattr(service, "MAX_CONNECTIONS", 3)
    server = RewardServer(JpegIncompressibility(), "jpeg")
    head = "POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{{"

    def unfinished(length: int) -> socket.socket:
        connection = socket.create_connection(server.server_address[:2])
        connection.sendall(head.format(length).encode())
        connection.settimeout(10)
        return connection

    with served(server) as url, ExitStack() as stack:
        first, second, third = (stack.enter_context(unfinished(length)) for length in (900, 900, 900))
        time.sleep(0.1)
        with stack.enter_context(socket.create_connection(server.server_address[:2])) as fourth:
            assert b"503 Service Unavailable" in fourth.recv(1000)
        # whoever came first has the room until the time is over; so do the others give up
        statuses = {connection.recv(1000).split()[1] for connection in (first, second, third)}
        assert b"408" in statuses <= {b"408", b"503"}
        assert posted(url, request())[0] == 200


def test_a_reward_that_hangs_is_reported() -> None:
    released = threading.Event()
    with served(RewardServer(lambda *_: released.wait(20), "own", timeout=0.1)) as url:
        status, reply = posted(url, request())
    released.set()
    assert status == 500 and "did not return within 0.1 s" in reply["error"]


def bodies(seed: int, count: int) -> Iterator[bytes]:
    """Requests that begin as good ones and are then changed, and requests of each kind that has done harm."""
    draw = random.Random(seed)
    good = json.loads(request())
    picture = base64.b64decode(encode_png(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)))
    for number in range(count):
        kind = number % 6
        if kind < 3:
            data = bytearray(picture)
            for _ in range(draw.randint(1, 8)):
                place = draw.randrange(len(data))
                if kind == 0:
                    data[place] = draw.randrange(256)
                elif kind == 1:
                    del data[place : place + draw.randint(1, 9)]
                else:
                    data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
            yield json.dumps(good | {"images": [base64.b64encode(data).decode()]}).encode()
        elif kind == 3:
            # a good checksum hides what the first lines of a decoder would have refused
            data = bytes(draw.randrange(256) for _ in range(draw.randrange(40)))
            name = draw.choice(
                [b"tEXt", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"gAMA", b"acTL", b"fcTL", b"IDAT", b"iCCP"]
            )
            images = [png(*draw.choice([(3, 3), (4096, 1), (0, 5), (2**31, 1)]), chunk(name, data))]
            yield json.dumps(good | {"images": images}).encode()
        elif kind == 4:
            odd = [None, True, 10**400, -1, 1e308, "x" * 1000, "\ud800", [[]], {"a": {}}, [None] * 9, ["\0"]]
            key = draw.choice(["images", "prompts", "metadata", "extra"])
            yield json.dumps(good | {key: draw.choice(odd)}).encode()
        else:
            body = bytearray(json.dumps(good).encode())
            body[draw.randrange(len(body))] = draw.randrange(256)
            yield bytes(body[: draw.randint(1, len(body))])


@pytest.mark.parametrize("seed", [0])
def test_changed_pictures_are_pictures_or_refused(seed: int) -> None:
    for body in bodies(seed, 600):
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(body)["images"][0]
            with suppress(ValueError):
                assert decode_png(text).dtype == np.uint8


@pytest.mark.ci
def test_the_server_survives_whatever_is_sent_in_bounded_memory(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def score(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    command = [sys.executable, "-m", "densegrpo_fast.rewards.server", "--reward", f"{own}:score", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            url = re.search(r"http://\S+", process.stdout.readline())[0]  # type: ignore[index]
            host, port = url.removeprefix("http://").split(":")
            for body in bodies(1, 120):
                status, reply = posted(url, body)
                assert status in (200, 400, 413) and ("scores" in reply or "error" in reply), reply
            # raw bytes that are no request
            draw = random.Random(2)
            for raw in (
                b"\0" * 9,
                b"GET " + b"x" * 70_000,
                b"POST /score HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                b"\r\n",
            ):
                with socket.create_connection((host, int(port))) as connection, suppress(OSError):
                    connection.sendall(raw + bytes(draw.randrange(256) for _ in range(50)))
                    connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(5)
                    connection.recv(1000)
            # small requests for much memory, several at a time: large pictures, and bodies that never end
            deep = plain(4096, 4096, depth=16, colour=6)
            harm = [
                request(images=[deep]),
                request(images=[plain(4096, 4096)] * 2, prompts=["p"] * 2, metadata=[{}] * 2),
            ]
            harm += [request(prompts=["\U0001f600" + "x" * 20_000_000]), b"[" * 60_000_000]
            threads = [threading.Thread(target=posted, args=(url, body)) for body in harm]
            with ExitStack() as stack:
                for _ in range(8):
                    waiting = stack.enter_context(socket.create_connection((host, int(port))))
                    waiting.sendall(
                        b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 60000000\r\n\r\n"
                    )
                    waiting.setblocking(False)
                    with suppress(OSError):
                        waiting.sendall(b" " * 2**22)
                for thread in threads:
                    thread.start()
                time.sleep(1)
            for thread in threads:
                thread.join(60)
            assert posted(url, request())[0] == 200
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            assert peak is not None and int(peak[1]) * 1024 < MEMORY, f"{int(peak[1]) // 1024} MiB"
        finally:
            process.terminate()
        assert "Traceback" not in process.stderr.read()
