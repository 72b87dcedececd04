"""Hostile requests to the reward server and hostile replies to its client, drawn by a seed, in bounded memory."""

from __future__ import annotations

import base64
import json
import random
import resource
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.pictures import encode_png
from densegrpo_fast.rewards import server as service
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.http import Endpoint
from densegrpo_fast.rewards.remote import RemoteReward
from densegrpo_fast.rewards.server import RewardServer

MEMORY = 720 * 2**20
"""Bytes that the requests of a case may make the server take on top of the 230 MB that it starts with."""
LONGEST = 30.0
"""Seconds after which an exchange hangs."""
HEAD = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> str:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")).decode()


def plain(width: int, height: int, depth: int = 8, colour: int = 2) -> str:
    """A picture of one colour: next to no bytes, however large."""
    channels = {0: 1, 2: 3, 6: 4}[colour] * depth // 8
    lines = zlib.compressobj(1)
    data = b"".join([lines.compress(b"\0" * (1 + channels * width)) for _ in range(height)] + [lines.flush()])
    return png(width, height, chunk(b"IDAT", data), depth=depth, colour=colour)


def damaged(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(found) or 1)
        draw.choice(
            [
                lambda place=place: found.__setitem__(slice(place, place + 1), bytes([draw.randrange(256)])),
                lambda place=place: found.__delitem__(slice(place, place + draw.randint(1, 9))),
                lambda place=place: found.__setitem__(slice(place, place), draw.randbytes(draw.randint(1, 9))),
            ]
        )()
    return bytes(found)


def request(draw: random.Random) -> bytes:
    """A whole HTTP request, of a kind that has done harm or could."""
    picture = base64.b64decode(encode_png(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)))
    good: dict[str, Any] = {"images": [base64.b64encode(picture).decode()], "prompts": ["p"], "metadata": [{}]}
    kind, head = draw.randrange(9), HEAD
    body = json.dumps(good).encode()
    if kind == 0:
        body = json.dumps(good | {"images": [base64.b64encode(damaged(picture, draw)).decode()]}).encode()
    elif kind == 1:
        name = draw.choice([b"tEXt", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"gAMA", b"acTL", b"fcTL", b"IDAT", b"iCCP"])
        size = draw.choice([(3, 3), (4096, 1), (0, 5), (2**31, 1), (4096, 4096)])
        content = draw.choice([draw.randbytes(draw.randrange(40)), zlib.compress(b"\0" * 10**7, 9)])
        body = json.dumps(good | {"images": [png(*size, chunk(name, content))]}).encode()
    elif kind == 2:
        odd = [None, True, 10**400, -1, 1e308, "x" * 1000, "\ud800", [[]], {"a": {}}, [None] * 9, ["\0"], [{}] * 70_000]
        body = json.dumps(good | {draw.choice([*good, "extra"]): draw.choice(odd)}).encode()
    elif kind == 3:
        body = damaged(body, draw)
    elif kind == 4:
        count = draw.randint(1, 3)
        side = draw.choice([512, 2048, 4096])
        large = plain(side, side, *draw.choice([(8, 2), (16, 6), (8, 0)]))
        body = json.dumps({"images": [large] * count, "prompts": ["p"] * count, "metadata": [{}] * count}).encode()
    elif kind == 5:
        body = draw.choice([b"[" * 10**6, b'{"a":' * 10**5, b'"' + b"x" * 10**7 + b'"', b"1" * 10**6, b"NaN", b""])
    elif kind == 6:
        lines = ["Content-Length: -1", "Content-Length: " + "9" * 30, "Transfer-Encoding: chunked", "Origin: null"]
        lines += ["Host: evil.example", "Authorization: Bearer é", "Content-Type: text/plain", "X: " + "y" * 70_000]
        lines += ["Host: [::1", "Host: \x00", "Expect: 100-continue", "Content-Length: 3\r\nContent-Length: 5"]
        head += draw.choice(lines) + "\r\n"
    elif kind == 7:
        head = draw.choice(
            ["GET /health HTTP/1.1\r\n", "PUT /score HTTP/1.1\r\n", "POST / HTTP/9.9\r\n", "x\r\n", "\0\n"]
        )
    else:
        return damaged(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, draw)
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(draw: random.Random, count: int) -> int:
    """Send requests, some of them at the same time or never finished: each is answered or hung up on."""
    service.PATIENCE = 3.0
    failed: list[BaseException] = []
    server = RewardServer(lambda images, prompts, metadata: images.mean((1, 2, 3)), "mean")
    server.handle_error = lambda *_: failed.append(sys_error()) if not isinstance(sys_error(), OSError) else None
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    before, address = peak(), server.server_address[:2]

    def send(data: bytes) -> bytes:
        with socket.create_connection(address) as connection:
            connection.settimeout(LONGEST)
            with suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            reply = b""
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    reply += part
            return reply

    waiting = [socket.create_connection(address) for _ in range(draw.randint(0, 8))]
    for connection in waiting:
        connection.settimeout(1.0)
        with suppress(OSError):
            connection.sendall(f"{HEAD}Content-Length: 60000000\r\n\r\n".encode() + b" " * 2**20)
    for _ in range(count):
        reply = send(request(draw))
        if reply.startswith(b"HTTP/1."):
            status = int(reply.split(maxsplit=2)[1])
            assert status < 500 or status in (501, 503, 505), reply[:300]
            content = reply.partition(b"\r\n\r\n")[2]
            if status == 200 and b'"scores"' in content:
                scores = json.loads(content)["scores"]
                assert all(score is None or 0 <= score <= 1 for score in scores), reply[:300]
    for connection in waiting:
        connection.close()
    good = request_of([plain(8, 8)])
    reply = send(good)
    assert b" 200 " in reply and b'"scores": [0.0]' in reply, reply[:300]
    server.shutdown()
    server.server_close()
    assert not failed, failed
    assert peak() - before < MEMORY, f"{(peak() - before) // 2**20} MiB"
    return 0


def request_of(images: list[str]) -> bytes:
    body = json.dumps({"images": images, "prompts": ["p"] * len(images), "metadata": [{}] * len(images)}).encode()
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def sys_error() -> BaseException | None:
    import sys

    return sys.exc_info()[1]


def replies(draw: random.Random) -> Iterator[bytes]:
    """The pieces of a reply; without end where the server never stops."""
    scores = draw.choice(
        ["[1, 0.5]", "[1]", "[]", "[1, null]", "[NaN, Infinity]", "[1e999, -1e999]", "[true, 1]", '["a", 1]', "null"]
    )
    scores = draw.choice([scores, f"[{'9' * 500}, 1]", "[" * 50_000, '[{"a": 1}, 2]', f"[{'1' * 5000}, 1]"])
    body = f'{{"scores": {scores}}}'.encode()
    coded = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    status = draw.choice([b"200 OK"] * 6 + [b"204 No Content", b"302 Found", b"404 x", b"429 x", b"500 x", b"99999 x"])
    head = b"HTTP/1.1 " + status + b"\r\n"
    kind = draw.randrange(10)
    if kind < 3:
        yield head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    elif kind == 3:
        yield head + b"Transfer-Encoding: chunked\r\n\r\n" + coded
    elif kind == 4:
        yield damaged(head + b"Content-Length: %d\r\n\r\n" % len(body) + body, draw)
    elif kind == 5:
        yield damaged(head + b"Transfer-Encoding: chunked\r\n\r\n" + coded, draw)
    elif kind == 6:
        size = draw.choice([b"-1", b"-5", b"f" * 25, b"0x10", b"", b"1;" + b"x" * 60_000])
        yield head + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n"
        while True:
            yield b" " * 2**16
    elif kind == 7:
        yield head + b"Content-Length: " + draw.choice([b"-1", b"9" * 30, b"1e9", b"", b"5, 5"]) + b"\r\n\r\n"
        while True:
            yield b" " * 2**16
    elif kind == 8:
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield draw.choice([b"X: y\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
    else:
        yield draw.choice(
            [b"", b"\0" * 99, b"HTTP/1.1 200 OK", draw.randbytes(300), b"HTTP/1.1 100 Continue\r\n\r\n" * 99]
        )


def ask(draw: random.Random, count: int) -> int:
    """Ask a server that replies like that: a score is a finite number or missing, and nothing else happens."""
    listening = socket.create_server(("127.0.0.1", 0))
    hostile, stopped = threading.Event(), threading.Event()

    def respond(connection: socket.socket, seed: int) -> None:
        with connection, suppress(OSError):
            connection.settimeout(LONGEST)
            connection.recv(65536)
            pieces = replies(random.Random(seed)) if hostile.is_set() else [HEALTHY]
            for piece in pieces:
                connection.sendall(piece)
                if stopped.is_set():
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=respond, args=(connection, draw.getrandbits(32)), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    before = peak()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    reward = RemoteReward(url=url, timeout=2.0, retries=0, breaker_after=10**6, max_reply=10_000)
    mixture = RewardMixture({"remote": (reward, 1.0)})
    hostile.set()
    for _ in range(count):
        started = time.monotonic()
        with suppress(RewardError):
            values = mixture(torch.zeros(2, 3, 8, 8), ["a", "b"]).values
            assert values.shape == (2,) and not values.isinf().any(), values
        assert time.monotonic() - started < LONGEST
    stopped.set()
    listening.close()
    assert isinstance(reward, Endpoint) and peak() - before < MEMORY, f"{(peak() - before) // 2**20} MiB"
    return 0


HEALTHY = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"status": "ok"}'
