"""The remote reward against its example server and against broken ones, alone and in a whole training run."""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from densegrpo_fast.common.pictures import decode_png, encode_png, to_bytes
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.jpeg import JpegIncompressibility
from densegrpo_fast.rewards.registry import create
from densegrpo_fast.rewards.server import RewardServer

QUICK = {"timeout": 5.0, "retries": 1, "retry_delay": 0.0}


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def score(url: str, images: torch.Tensor, prompts: list[str], metadata: Any = None, **options: Any) -> list[float]:
    reward = create("remote", url=url, **(QUICK | options))
    return RewardMixture({"remote": (reward, 1.0)})(images, prompts, metadata).values.tolist()


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24).mul(255).round() / 255


def test_png_keeps_every_pixel() -> None:
    picture = to_bytes(pictures(1))[0]
    assert np.array_equal(decode_png(encode_png(picture)), picture)
    assert to_bytes(torch.tensor([-1.0, 0.5, 0.502, 2.0]).expand(1, 3, 1, 4))[0, 0, :, 0].tolist() == [0, 128, 128, 255]


def test_remote_scores_are_the_local_ones() -> None:
    images = pictures(7)
    with served(RewardServer(JpegIncompressibility(), "jpeg")) as url:
        scores = score(url, images, ["p"] * 7, batch=3, concurrency=2)
        assert score(url, images[:0], []) == []
    # six digits: scores travel as text, and are float32 in the end
    assert scores == pytest.approx(JpegIncompressibility()(images, ["p"] * 7), rel=1e-6)
    assert len(set(scores)) > 1


def test_the_example_of_the_server_s_page_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sys.modules[RewardServer.__module__].__doc__ or ""
    code = page.partition("`image_reward.py` is")[2].partition("served with")[0]
    (tmp_path / "image_reward.py").write_text(textwrap.dedent(code))
    # the package's interface: a named model whose score takes a prompt and a Pillow picture
    model = SimpleNamespace(score=lambda prompt, picture: len(prompt) + picture.width / 100)
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: model))
    judge = create(f"{tmp_path / 'image_reward.py'}:Judge")
    with served(RewardServer(judge, "image_reward")) as url:
        assert score(url, pictures(2), ["ab", "abc"]) == pytest.approx([2.24, 3.24])


def test_prompts_metadata_and_missing_scores_travel() -> None:
    def reward(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
        assert images.shape[1:] == (3, 16, 24) and images.is_floating_point()
        return [
            None if prompt == "?" else row["n"] + len(prompt) for prompt, row in zip(prompts, metadata, strict=True)
        ]

    with served(RewardServer(reward, "own")) as url:
        scores = score(url, pictures(3), ["ä", "?", "two"], [{"n": 0.5}, {"n": 1}, {"n": 2}], batch=2)
    assert scores[::2] == [1.5, 5.0] and math.isnan(scores[1])


def test_processes_take_turns_among_servers_and_share_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(value: float) -> RewardServer:
        return RewardServer(lambda images, prompts, metadata: [value] * len(prompts), "constant")

    monkeypatch.setenv("WORLD_SIZE", "3")
    with served(constant(0.0)) as first, served(constant(1.0)) as second:
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            reward = create("remote", url=[first, second], concurrency=8, **QUICK)
            assert RewardMixture({"remote": (reward, 1.0)})(pictures(1), ["p"]).values.tolist() == [rank % 2]
            assert (reward.address, reward.own_concurrency) == ((first, second)[rank % 2], 2)
    with pytest.raises(ValueError, match="url: expected the address of a server, got none"):
        create("remote", url=[], **QUICK)


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "right")
    monkeypatch.setenv("OTHER_TOKEN", "wrong")
    with served(RewardServer(JpegIncompressibility(), "jpeg", token="right")) as url:
        assert score(url, pictures(1), ["p"], token_env="JUDGE_TOKEN")[0] > 0
        for options in ({}, {"token_env": "OTHER_TOKEN"}):
            with pytest.raises(OSError, match="status 401"):
                create("remote", url=url, **QUICK, **options)


def posted(url: str, body: bytes, path: str = "/score", **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url + path, data=body, headers={"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def request(**changes: Any) -> bytes:
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    return json.dumps({"images": [picture], "prompts": ["p"], "metadata": [{}]} | changes).encode()


LARGE = encode_png(np.zeros((1, 5000, 3), np.uint8))


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        (b"{", 400, "expected JSON"),
        (b"[" * 100_000, 400, "expected JSON"),
        (b"\x80\x04\x95", 400, "expected JSON"),
        (b"[]", 400, "expected an object"),
        (request(images="x"), 400, "expected images, a list of texts"),
        (request(prompts=[3]), 400, "expected prompts, a list of texts"),
        (request(metadata=[1]), 400, "expected metadata, a list of objects"),
        (request(prompts=["a", "b"]), 400, "got 1 images, 2 prompts, 1 metadata"),
        (request(images=[], prompts=[], metadata=[]), 400, "at least one"),
        (request(images=["é"]), 400, "image 0: not base64"),
        (request(images=["R0lGODlhAQABAAAAACw="]), 400, "image 0: not a PNG picture"),
        (request(images=[LARGE]), 400, "image 0: 5000 x 1 pixels"),
    ],
)
def test_the_server_refuses_bad_requests(body: bytes, status: int, problem: str) -> None:
    with served(RewardServer(JpegIncompressibility(), "jpeg")) as url:
        found, reply = posted(url, body)
    assert (found, problem in reply["error"]) == (status, True), reply


def test_the_server_outlives_a_reward_that_fails() -> None:
    def broken(images: torch.Tensor, prompts: list[str], metadata: Any) -> list[float]:
        if prompts[0] == "bad":
            raise KeyError("quotes")
        return [1.0] * len(prompts)

    with served(RewardServer(broken, "own")) as url:
        assert posted(url, request(prompts=["bad"])) == (500, {"error": "reward 'own' raised KeyError: 'quotes'"})
        assert posted(url, request()) == (200, {"scores": [1.0]})
        assert posted(url, request(), "/elsewhere")[0] == 404


class Broken(ThreadingHTTPServer):
    """A reward server that answers `/score` in a way of its own and counts how often it is asked.

    Args:
        answer: (number of the request, pictures in it) -> status and body; None = no answer for a long time.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[int, int], tuple[int, bytes] | None]):
        self.answer, self.asked, self.closing = answer, 0, threading.Event()
        super().__init__(("127.0.0.1", 0), _BrokenHandler)

    def server_close(self) -> None:
        self.closing.set()
        super().server_close()


class _BrokenHandler(BaseHTTPRequestHandler):
    server: Broken

    def do_GET(self) -> None:
        self._send(200, b'{"status": "ok"}')

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        reply = self.server.answer(self.server.asked, len(content["images"]))
        if reply is None:
            self.server.closing.wait(20)
        else:
            self._send(*reply)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def scores_of(values: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": values}).encode()


FAULTS: dict[str, tuple[Callable[[int], tuple[int, bytes] | None], str]] = {
    "hung": (lambda count: None, "no whole reply within 0.3 s"),
    "500": (lambda count: (500, b"out of memory"), "status 500 Internal Server Error: out of memory"),
    "garbage": (lambda count: (200, b"\x80\x04\x95pickle"), "the reply is not JSON"),
    "no scores": (lambda count: (200, b'{"outputs": [1]}'), 'expected {"scores": [...]}'),
    "too short": (lambda count: scores_of([1.0] * (count - 1)), "expected 2 scores, one per picture, got 1"),
    "too long": (lambda count: scores_of([1.0] * (count + 1)), "expected 2 scores, one per picture, got 3"),
    "words": (lambda count: scores_of(["good"] * count), "expected numbers or null as scores, got 'good'"),
    "truth": (lambda count: scores_of([True] * count), "expected numbers or null"),
    "oversized": (lambda count: (200, b" " * 3000 + b"[1]"), "the reply is longer than 2000 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_its_pictures_without_a_score(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    reply, problem = FAULTS[fault]
    # the second request of the two fails, and so do its retries
    server = Broken(lambda number, count: scores_of([0.25] * count) if number == 1 else reply(count))
    options = {"timeout": 0.3, "max_reply": 2000, "batch": 2, "concurrency": 1}
    with served(server) as url, caplog.at_level(logging.WARNING):
        scores = score(url, pictures(4), ["p"] * 4, **options)
    assert scores[:2] == [0.25, 0.25] and all(math.isnan(value) for value in scores[2:])
    assert [record.getMessage() for record in caplog.records if problem in record.getMessage()][0].endswith(
        "2 scores are missing"
    )


def test_scores_that_are_not_finite_are_missing_one_by_one() -> None:
    body = b'{"scores": [1.5, NaN, Infinity, -1e999, 2, null, 1' + b"0" * 400 + b"]}"
    with served(Broken(lambda number, count: (200, body))) as url:
        scores = score(url, pictures(7), ["p"] * 7)
    assert [None if math.isnan(value) else value for value in scores] == [1.5, None, None, None, 2.0, None, None]


def test_a_passing_fault_is_ridden_out() -> None:
    server = Broken(lambda number, count: (503, b"") if number <= 2 else scores_of([1.0] * count))
    with served(server) as url:
        assert score(url, pictures(2), ["p"] * 2, retries=2) == [1.0, 1.0]
    assert server.asked == 3


def test_a_dead_server_is_given_up_after_a_few_requests() -> None:
    server = Broken(lambda number, count: (500, b""))
    with served(server) as url:
        options = {"batch": 1, "concurrency": 1, "retries": 1, "breaker_after": 2, "cooldown": 60.0}
        assert all(math.isnan(value) for value in score(url, pictures(9), ["p"] * 9, **options))
    # two requests with a retry each, then none
    assert server.asked == 4


def test_metadata_that_is_no_json_is_the_callers_mistake() -> None:
    with served(RewardServer(JpegIncompressibility(), "jpeg")) as url, pytest.raises(Exception, match="JSON"):
        score(url, pictures(1), ["p"], [{"tensor": torch.zeros(1)}])


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with served(Broken(lambda number, count: None)) as url:
        pass
    with pytest.raises(OSError, match=rf"no reward server at {url} .*start one with python -m densegrpo_fast.rewards"):
        create("remote", url=url, **QUICK)


Train = Callable[..., int]


def run(train: Train, output: Path, url: str, **options: Any) -> int:
    """A training run that asks for two pictures at a time; a held-out evaluation is one request."""
    quick = {
        "timeout": 1.0,
        "retries": 0,
        "batch": 2,
        "concurrency": 1,
        "breaker_after": 99,
        "use": "remote",
        "url": url,
    }
    settings = {"reward.terms": "{far: 1.0}", "reward.observed": "[]", "reward.options": json.dumps({"far": quick})}
    settings |= {"evaluation.every": 0, "run.iterations": 3, "objective.trained_steps": "all_but_last"}
    return train(output, **(settings | options))


@pytest.mark.ci
def test_a_run_goes_on_while_few_scores_are_missing(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [fault for fault, _ in FAULTS.values()]

    def answer(number: int, count: int) -> tuple[int, bytes] | None:
        values = [float((7 * number + i) % 5) for i in range(count)]
        # every third request meets one of the faults in turn
        return faults[number // 3 % len(faults)](count) if number % 3 == 0 else scores_of(values)

    with served(Broken(answer)) as url, caplog.at_level(logging.WARNING):
        assert run(train, tmp_path / "run", url, **{"reward.max_missing": 0.6}) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and all(0 < record["reward_missing"] < 1 for record in records)
    assert all(math.isfinite(record["rewards/far/mean"]) for record in records)
    assert "2 scores are missing" in caplog.text


@pytest.mark.ci
def test_a_run_stops_when_too_many_scores_are_missing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the first evaluation (one request of 2 pictures) succeeds, and all that follows fails
    server = Broken(lambda number, count: scores_of([1.0, 2.0]) if number == 1 else (500, b"gone"))
    with served(server) as url:
        assert run(train, tmp_path / "run", url, **{"reward.max_missing": 0.6}) == 5
    assert "100% of the scores are missing, reward.max_missing allows 60%" in capsys.readouterr().err


@pytest.mark.ci
def test_a_run_without_its_server_stops_before_it_starts(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Broken(lambda number, count: None)) as url:
        pass
    assert run(train, tmp_path / "run", url) == 5
    assert f"no reward server at {url}" in capsys.readouterr().err
    assert run(train, tmp_path / "run", "ftp://host") == 2
    assert "url: expected an address that starts with http:// or https://" in capsys.readouterr().err


@pytest.mark.ci
def test_a_run_whose_evaluation_has_no_score_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Broken(lambda number, count: (500, b"gone"))) as url:
        assert run(train, tmp_path / "run", url) == 5
    assert (
        "the held-out evaluation before training has no score of 'reward': all are missing" in capsys.readouterr().err
    )
