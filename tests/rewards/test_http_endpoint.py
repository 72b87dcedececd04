"""HTTP for rewards on the loopback interface: what counts as a failure, when it is tried again, and when no more."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from densegrpo_fast.rewards.http import CircuitBreaker, Endpoint, HttpFailure

Respond = Callable[[socket.socket], None]


def http(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def _received(connection: socket.socket) -> bytes:
    """A whole request, or what of it came before the client hung up."""
    data = b""
    while part := connection.recv(65536):
        data += part
        head, found, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if found and len(body) >= (int(length[1]) if length else 0):
            break
    return data


class Loopback:
    """A server that treats its connections as told, one response after the other, the last one for ever.

    Attributes:
        requests: the bytes of each request.
    """

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1/"
        self.responses: list[bytes | Respond] = []
        self.requests: list[bytes] = []
        self.closing = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._respond, args=(connection,), daemon=True).start()

    def _respond(self, connection: socket.socket) -> None:
        with connection:
            response = self.responses[min(len(self.requests), len(self.responses) - 1)]
            self.requests.append(_received(connection))
            try:
                connection.sendall(response) if isinstance(response, bytes) else response(connection)
            except OSError:
                pass  # the client hung up, as it should

    def hang(self, connection: socket.socket) -> None:
        self.closing.wait(20)

    def dribble(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not self.closing.wait(0.02):
            connection.sendall(b" ")

    def dribble_headers(self, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not self.closing.wait(0.02):
            connection.sendall(b"X: y\r\n")


@pytest.fixture
def server() -> Iterator[Loopback]:
    loopback = Loopback()
    yield loopback
    loopback.closing.set()
    loopback.socket.close()


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(**({"url": url, "timeout": 5.0, "retries": 0, "retry_delay": 0.0} | options))


def ask(client: Endpoint, payload: Any = None) -> Any:
    return client.call("POST", "/score", payload, parse=lambda data: data)


def failure(client: Endpoint) -> HttpFailure:
    with pytest.raises(HttpFailure) as caught:
        ask(client)
    return caught.value


def test_an_ipv6_address_without_a_port_has_the_port_of_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    for url in ("http://[::1]", "https://[::1]", "http://[::1]:8000"):
        failure(endpoint(url))
    assert asked == [("::1", 80), ("::1", 443), ("::1", 8000)]


def test_a_request_and_its_reply(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    server.responses = [http(b'{"scores": [1, null]}')]
    client = endpoint(server.url, token_env="JUDGE_TOKEN")
    assert ask(client, {"prompt": "ä"}) == {"scores": [1, None]}
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/score HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret" in head and b"\r\nContent-Type: application/json" in head
    assert json.loads(body) == {"prompt": "ä"}
    assert "secret" not in repr(client)


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (http(b"busy", "500 Internal Server Error"), "status 500 Internal Server Error: busy"),
        (http(b"", "503 Service Unavailable", "Retry-After: 1\r\n"), "status 503"),
        (http(b"", "429 Too Many Requests"), "status 429"),
        (b"", "RemoteDisconnected"),
        (b"no HTTP at all\r\n\r\n", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "headers"),
        (b"HTTP/1.1 no \x1b[2J\r\n\r\n", r"BadStatusLine: HTTP/1.1 no \x1b[2J"),
        (b"HTTP/1.1 500 " + b"x" * 60_000 + b"\r\n\r\n\x1b]0;title\x07", "status 500 xxx"),
    ],
)
def test_failures_that_may_pass_are_tried_again(server: Loopback, response: bytes, problem: str) -> None:
    server.responses = [response, response, http(b"[1]")]
    assert ask(endpoint(server.url, retries=2)) == [1]
    assert len(server.requests) == 3
    server.requests.clear()
    found = failure(endpoint(server.url, retries=1))
    assert found.temporary and problem in str(found) and len(server.requests) == 2
    # no reply reaches into a terminal
    assert str(found).isprintable() and len(str(found)) < 500


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (http(b"<html>" + b"x" * 900, "404 Not Found"), "status 404 Not Found: <html>x"),
        (http(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n"), "status 302 Found"),
        (http(b"\x80\x04garbage"), r"the reply is not JSON: '\x04garbage'".replace(r"\x04", "�\\x04")),
        (http(b"[" * 100_000), "the reply is not JSON"),
        (http(b'{"scores": [1'), "the reply is not JSON"),
        (http(b""), "the reply is not JSON"),
        (http(b"[" + b" " * 300_000 + b"]"), "the reply is longer than 200000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n" + b" " * 300_000, "longer than 200000 bytes"),
    ],
)
def test_failures_that_stay_are_not_tried_again(server: Loopback, response: bytes, problem: str) -> None:
    server.responses = [response]
    found = failure(endpoint(server.url, retries=3, max_reply=200_000))
    assert problem in str(found) and len(str(found)) < 400
    assert not found.temporary and len(server.requests) == 1


@pytest.mark.parametrize("slowly", ["hang", "dribble", "dribble_headers"])
def test_the_deadline_is_for_the_whole_exchange(server: Loopback, slowly: str) -> None:
    server.responses = [getattr(server, slowly)]
    found = failure(endpoint(server.url, timeout=0.3))
    assert str(found) == "no whole reply within 0.3 s" and found.temporary


def test_a_server_that_does_not_read_is_given_up(server: Loopback) -> None:
    server.responses = [server.hang]
    with pytest.raises(HttpFailure, match="within 0.3 s"):
        ask(endpoint(server.url, timeout=0.3), {"images": ["x" * 30_000_000]})


def test_a_refused_connection_is_tried_again_and_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = failure(endpoint(f"http://127.0.0.1:{port}", retries=1))
    assert found.temporary and "ConnectionRefusedError" in str(found)


def test_a_reply_that_is_not_what_was_asked_for(server: Loopback) -> None:
    def two(data: Any) -> Any:
        if len(data) != 2:
            raise ValueError(f"expected 2 scores, got {len(data)}")
        return data

    server.responses = [http(b"[1]")]
    with pytest.raises(HttpFailure, match="expected 2 scores, got 1"):
        endpoint(server.url, retries=3).call("GET", "/score", parse=two)
    assert len(server.requests) == 1


def test_waits_are_drawn_below_a_bound_that_doubles_and_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for _ in range(100):
        # nothing listens
        failure(endpoint("http://127.0.0.1:9", retry_delay=1.0, retries=7))
    for attempt, longest in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)):
        drawn = waits[attempt::7]
        assert len(drawn) == 100 and 0 <= min(drawn) < longest / 4 and 3 * longest / 4 < max(drawn) <= longest


def test_the_breaker_opens_lets_one_try_through_and_closes() -> None:
    now = [0.0]
    breaker = CircuitBreaker(after=2, cooldown=10.0, clock=lambda: now[0])
    for success in (False, True, False, False):
        assert breaker.allows()
        breaker.report(success)
    assert not breaker.allows()
    now[0] = 10.0
    assert breaker.allows() and not breaker.allows(), "one trial at a time"
    breaker.report(success=False)
    now[0] = 19.9
    assert not breaker.allows()
    now[0] = 20.0
    assert breaker.allows()
    breaker.report(success=True)
    assert breaker.allows() and breaker.allows()


def test_a_dead_server_is_left_alone(server: Loopback) -> None:
    server.responses = [http(b"", "500 Broken")]
    client = endpoint(server.url, retries=1, breaker_after=2, cooldown=60.0)
    assert [str(failure(client))[:10] for _ in range(2)] == ["status 500"] * 2
    assert len(server.requests) == 4
    start = time.monotonic()
    assert "left alone for up to 60 s after 2 failures in a row" in str(failure(client))
    assert len(server.requests) == 4 and time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "ftp://host"}, "starts with http:// or https://, got 'ftp://host'"),
        ({"url": "localhost:8000"}, "starts with http"),
        ({"url": "http://"}, "starts with http"),
        ({"url": "http://host:x"}, "url: Port"),
        ({"url": "http://ho st"}, "starts with http"),
        ({"url": "http://host/\r\nX: y"}, "starts with http"),
        ({"url": "http://me:secret@host"}, "no user name or password"),
        ({"url": "http://host/?key=1"}, "no query"),
        ({"timeout": 0.0}, "timeout: expected a number above 0, got 0.0"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries: expected a number at least 0, got -1"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_reply": 0}, "max_reply"),
        ({"breaker_after": 0}, "breaker_after"),
        ({"token_env": "NO_SUCH_TOKEN"}, "the environment variable NO_SUCH_TOKEN holds no token"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        endpoint(**({"url": "http://localhost:1"} | options))
    assert problem in str(caught.value) and "secret" not in str(caught.value)


REPLIES = [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffffffffff\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1;" + b"x" * 60_000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 99999 OK\r\n\r\n",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_the_limits_hold_for_every_coding(server: Loopback, reply: bytes) -> None:
    sent: list[int] = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(reply)
        while not server.closing.is_set():
            sent.append(connection.send(reply if b"Continue" in reply else b" " * 2**16))

    server.responses = [endless]
    failure(endpoint(server.url, max_reply=100_000))
    # what the sockets' own buffers hold comes on top
    assert sum(sent) < 30 * 2**20


def test_changed_replies_are_replies_or_failures(server: Loopback) -> None:
    draw = random.Random(0)
    good = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n{"scores": [1, 2]}\r\n0\r\n\r\n'
    client = endpoint(server.url, timeout=2.0, max_reply=1000, breaker_after=10**6)
    for _ in range(120):
        reply = bytearray(good)
        for _ in range(draw.randint(1, 5)):
            reply[draw.randrange(len(reply))] = draw.choice(b"-0159af\r\n {}[]\xff")
        server.responses, server.requests = [bytes(reply)], []
        with suppress(HttpFailure):
            ask(client)
