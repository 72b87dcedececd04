"""JSON over HTTP, for rewards in another process: deadlines, capped retries, a circuit breaker, bounded replies.

Only JSON is read: nothing that a server sends is ever run. The whole exchange has one deadline, so a server that sends
a byte a minute is a slow server, not an endless one; and one limit on the bytes that are received, whatever a reply
says of its length or its coding. Redirects are not followed and proxies not used.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

Parsed = TypeVar("Parsed")

_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_DELAY = 30.0
_SHOWN_REPLY, _SHOWN_PROBLEM = 200, 400
_OVERHEAD = 2**18
"""Bytes that a reply may take beside its body: status, headers and the sizes of its chunks."""


class HttpFailure(Exception):
    """An exchange gave no usable reply.

    Args:
        problem: what is wrong; the parts of a reply in it are shown as one line that a terminal does not interpret.

    Attributes:
        temporary: whether asking again may help.
        status: the HTTP status, if there was one.
    """

    def __init__(self, problem: str, *, temporary: bool = False, status: int | None = None):
        shown = " ".join(problem.split())[:_SHOWN_PROBLEM]
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown))
        self.temporary, self.status = temporary, status


class CircuitBreaker:
    """Stops asking a server that has failed several times in a row, and tries it again with one call at a time.

    Args:
        after: failed calls in a row that open it.
        cooldown: seconds that it stays open before a single call is let through; its result decides.
        clock: seconds that only grow.
    """

    def __init__(self, after: int, cooldown: float, clock: Callable[[], float] = time.monotonic):
        self.after, self.cooldown, self._clock = after, cooldown, clock
        self._failures, self._retry_at = 0, 0.0
        self._lock = threading.Lock()

    def allows(self) -> bool:
        """Whether a call may go ahead; each must be followed by `report`."""
        with self._lock:
            if self._failures < self.after:
                return True
            if self._clock() < self._retry_at:
                return False
            # this call is the trial; the others wait for its result
            self._retry_at = self._clock() + self.cooldown
            return True

    def report(self, success: bool) -> None:
        """How an allowed call ended."""
        with self._lock:
            self._failures = 0 if success else self._failures + 1
            if not success:
                self._retry_at = self._clock() + self.cooldown


@dataclass(kw_only=True, eq=False)
class Endpoint:
    """A server that is asked in JSON.

    Args:
        url: http(s) address of the server; a path is kept, user names, queries and fragments are refused. Of several
            servers each process of a run asks one, in turn.
        timeout: seconds for one exchange, from connecting to the last byte.
        retries: further attempts after a failure that may pass: no connection, a timeout, or one of the statuses 408,
            425, 429, 500, 502, 503, 504.
        retry_delay: longest wait in seconds before the first retry; it doubles with each, up to 30. The wait is drawn
            evenly from 0 to there, so that many clients do not come back at once.
        breaker_after: failed calls (each with all its retries) in a row after which the server is left alone.
        cooldown: seconds for which it is left alone.
        max_reply: largest reply in bytes.
        concurrency: calls in flight at once, of all processes of the run together; at least one of each.
        token_env: environment variable whose value is sent as bearer token; None = none.

    Raises:
        ValueError: an argument is out of range, or the variable is not set.
    """

    url: str | list[str]
    timeout: float = 60.0
    retries: int = 3
    retry_delay: float = 1.0
    breaker_after: int = 3
    cooldown: float = 30.0
    max_reply: int = 2**20
    concurrency: int = 4
    token_env: str | None = None

    def __post_init__(self) -> None:
        urls = [self.url] if isinstance(self.url, str) else self.url
        addresses = [_address(url) for url in urls]
        if not urls:
            raise ValueError("url: expected the address of a server, got none")
        own = _process("RANK", 0) % len(urls)
        self.address = urls[own]
        self._secure, self._host, self._port, self._path = addresses[own]
        lowest = {"timeout": 0.0, "retries": -1, "retry_delay": -1e-9, "cooldown": -1e-9}
        lowest |= {"breaker_after": 0, "max_reply": 0, "concurrency": 0}
        for name, bound in lowest.items():
            if not bound < getattr(self, name) < float("inf"):
                kind = "above 0" if bound == 0 else "at least 0"
                raise ValueError(f"{name}: expected a number {kind}, got {getattr(self, name)}")
        self._token = _token(self.token_env)
        self._breaker = CircuitBreaker(self.breaker_after, self.cooldown)
        # its own generator: waiting must not change what a run draws
        self._random = random.Random()

    @property
    def own_concurrency(self) -> int:
        """Calls in flight at once of this process."""
        return max(1, self.concurrency // max(1, _process("WORLD_SIZE", 1)))

    def call(self, method: str, path: str, payload: Any = None, *, parse: Callable[[Any], Parsed]) -> Parsed:
        """Ask, again if need be, and check the reply.

        Args:
            method: GET or POST.
            path: below the endpoint's URL, starting with a slash.
            payload: JSON data; None = no body.
            parse: makes the result of the reply's JSON data; raises ValueError if that is not what was asked for.

        Raises:
            HttpFailure: no usable reply.
            TypeError, ValueError: the payload is not JSON data.
        """
        body = None if payload is None else json.dumps(payload, allow_nan=False).encode("ascii")
        if not self._breaker.allows():
            raise HttpFailure(f"left alone for up to {self.cooldown:g} s after {self.breaker_after} failures in a row")
        attempt = 0
        while True:
            try:
                result = _parsed(self._exchange(method, path, body), parse)
            except HttpFailure as failure:
                if not failure.temporary or attempt >= self.retries:
                    self._breaker.report(success=False)
                    raise
                time.sleep(self._delay(attempt))
                attempt += 1
            else:
                self._breaker.report(success=True)
                return result

    def _delay(self, attempt: int) -> float:
        return self._random.uniform(0, min(self.retry_delay * 2**attempt, _LONGEST_DELAY))

    def _exchange(self, method: str, path: str, body: bytes | None) -> bytes:
        """One request and its reply's body."""
        kind = _SecureConnection if self._secure else _Connection
        connection = kind(self._host, self._port, timeout=self.timeout)
        connection.most = 2 * self.max_reply + _OVERHEAD
        headers = {"Accept": "application/json", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            content = response.read(self.max_reply + 1)
        except TimeoutError:
            raise HttpFailure(f"no whole reply within {self.timeout:g} s", temporary=True) from None
        except _TooLong:
            raise HttpFailure(f"the reply is longer than {self.max_reply} bytes") from None
        # http.client itself fails in many ways at a negative or a huge size
        except (OSError, http.client.HTTPException, ValueError, ArithmeticError) as error:
            raise HttpFailure(f"{type(error).__name__}: {error}", temporary=True) from None
        finally:
            connection.close()
        if len(content) > self.max_reply:
            raise HttpFailure(f"the reply is longer than {self.max_reply} bytes")
        if response.status != 200:
            shown = " ".join(content[:_SHOWN_REPLY].decode("utf-8", "replace").split())
            raise HttpFailure(
                f"status {response.status} {response.reason}: {shown}".rstrip(": "),
                temporary=response.status in _TEMPORARY,
                status=response.status,
            )
        return content


def _parsed(content: bytes, parse: Callable[[Any], Parsed]) -> Parsed:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        shown = " ".join(content[:_SHOWN_REPLY].decode("utf-8", "replace").split())
        raise HttpFailure(f"the reply is not JSON: {shown!r}") from None
    try:
        return parse(data)
    except ValueError as error:
        raise HttpFailure(str(error)) from None


def _process(variable: str, default: int) -> int:
    """What torchrun says of this process."""
    given = os.environ.get(variable, "")
    return int(given) if given.isdecimal() else default


def _address(url: str) -> tuple[bool, str, int, str]:
    """(https, host, port, path without its last slash) of a URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"url: {error}, in {url!r}") from None
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\x00-\x20\x7f]", url):
        raise ValueError(f"url: expected an address that starts with http:// or https://, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"url: expected no user name or password in the address; name a token with token_env: {host}")
    if parts.query or parts.fragment:
        raise ValueError(f"url: expected no query or fragment, got {url!r}")
    secure = parts.scheme == "https"
    # without a number http.client would take the end of an IPv6 address for one
    if port is None:
        port = http.client.HTTPS_PORT if secure else http.client.HTTP_PORT
    return secure, host, port, parts.path.rstrip("/")


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError(f"token_env: the environment variable {variable} holds no token")
    return token


class _TooLong(OSError):
    """More bytes have come than a reply may have."""


class _Deadline:
    """A socket whose operations must all end by one moment. What http.client needs of a socket, and no more."""

    def __init__(self, sock: socket.socket, rest: Callable[[], float], most: int):
        self._socket, self._rest, self._most = sock, rest, most

    def sendall(self, data: bytes) -> None:
        # for sendall the timeout is that of the whole call
        self._socket.settimeout(self._rest())
        self._socket.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(DeadlineReader(self._socket, self._rest, self._most))

    def close(self) -> None:
        self._socket.close()


def remaining(seconds: float) -> Callable[[], float]:
    """What gives the seconds that are left, and raises TimeoutError when there are none."""
    moment = time.monotonic() + seconds

    def rest() -> float:
        left = moment - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline")
        return left

    return rest


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until a moment, and no more than so many bytes.

    Args:
        sock: the socket.
        rest: as `remaining` makes it.
        most: bytes.
    """

    def __init__(self, sock: socket.socket, rest: Callable[[], float], most: int):
        # a file of the socket keeps it open after http.client closes the connection
        self._socket, self._file, self._rest, self._left = sock, sock.makefile("rb", buffering=0), rest, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._rest())
        count = self._file.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise _TooLong("too many bytes")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    """A connection whose timeout is that of the whole exchange.

    Attributes:
        most: bytes that it receives.
    """

    most = 0

    def connect(self) -> None:
        rest = remaining(self.timeout or 0)
        super().connect()
        self.sock: Any = _Deadline(self.sock, rest, self.most)


class _SecureConnection(http.client.HTTPSConnection):
    """The same over TLS, with the server's certificate checked."""

    most = 0

    def connect(self) -> None:
        rest = remaining(self.timeout or 0)
        super().connect()
        self.sock: Any = _Deadline(self.sock, rest, self.most)
