"""The watch command: read only, on the loopback interface, and patient with files that are being written."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from densegrpo_fast.watch import HOST, main, serve


@pytest.fixture
def run(tmp_path: Path, fill_run: Callable[..., Path]) -> Path:
    return fill_run(tmp_path / "run", done=30, times=("before", "iteration-00020"))


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    server = serve(run, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def get(port: int, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_the_page_is_that_of_the_moment(run: Path, port: int, run_record: Callable[[int], object]) -> None:
    status, page = get(port, "/")
    status, version = get(port, "/version")
    assert status == 200 and f'data-live="{version}"' in page and "Iteration 30 of 40" in page
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(run_record(31)) + "\n")
    assert get(port, "/version")[1] != version and "Iteration 31 of 40" in get(port, "/")[1]
    # half a file: the page before it stays
    (run / "evaluation-iteration-00020.json").write_text('{"prom')
    assert get(port, "/")[0] == 200 and "Iteration 31 of 40" in get(port, "/")[1]
    assert not (run / "report.html").exists(), "nothing is written"


def test_nothing_else_is_served_and_nobody_else_is_let_in(port: int) -> None:
    assert [get(port, path)[0] for path in ("/config.yaml", "/../run/config.yaml", "/version/")] == [404] * 3
    assert get(port, "/", host="example.org")[0] == 403 and get(port, "/version", host="")[0] == 403
    assert get(port, "/", host=f"localhost:{port}")[0] == 200
    assert get(port, "/", method="POST")[0] == 501


def test_bad_input(tmp_path: Path, run: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        ([str(tmp_path / "none")], 3, "there is no run here"),
        ([str(run), "--port", str(port)], 7, "--port: cannot listen"),
        ([str(run), "--port", "70000"], 2, "expected a port in 0..65535"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code and words in capsys.readouterr().err
