"""The VLM judge against a server that speaks the OpenAI protocol."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from densegrpo_fast.common.pictures import decode_png
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.registry import create
from densegrpo_fast.rewards.vlm_judge import VlmJudge


class Model(ThreadingHTTPServer):
    """A chat model that answers as `answer(request)` says.

    Attributes:
        models: status and body of the list of models.
        requests: the bodies it was sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], Any] = lambda request: "Final Score: 4"
        self.models: tuple[int, Any] = (200, {"data": [{"id": "judge"}, {"id": "other"}]})
        self.requests: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Model

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(*self.server.models)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        answer = self.server.answer(request)
        body = answer if isinstance(answer, dict) else {"choices": [{"message": {"content": answer}}]}
        self._send(200, body)

    def _send(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def model() -> Iterator[Model]:
    server = Model()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(server: Model, **options: Any) -> VlmJudge:
    quick = {"url": server.url, "model": "judge", "timeout": 5.0, "retries": 1, "retry_delay": 0.0}
    return create("vlm_judge", **(quick | options))


def scores(reward: VlmJudge, images: torch.Tensor, prompts: list[str]) -> list[float | None]:
    values = RewardMixture({"judge": (reward, 1.0)})(images, prompts).values.tolist()
    return [None if math.isnan(value) else value for value in values]


def test_each_picture_is_judged_with_its_prompt(model: Model) -> None:
    images = torch.stack([torch.full((3, 8, 8), value) for value in (0.0, 0.4, 1.0)])

    def answer(request: dict[str, Any]) -> str:
        picture, text = request["messages"][0]["content"]
        url = picture["image_url"]["url"]
        assert url.startswith("data:image/png;base64,")
        level = decode_png(url.partition(",")[2])[0, 0, 0]
        number = {0: 1, 102: 2.5, 255: 5}[int(level)]
        assert f"picture {number}" in text["text"]
        return f"It is fine.\nFinal Score: {number}"

    model.answer = answer
    reward = judge(model, concurrency=2, request={"temperature": 0, "seed": 3})
    # on a scale to 5: 1/5, 2.5/5, 5/5
    found = scores(reward, images, ["picture 1", "picture 2.5", "picture 5"])
    assert np.allclose(np.array(found, dtype=float), [0.2, 0.5, 1.0])
    assert len(model.requests) == 3
    assert {(r["model"], r["temperature"], r["seed"]) for r in model.requests} == {("judge", 0, 3)}


def test_a_prompt_is_never_taken_for_a_template(model: Model) -> None:
    scores(judge(model), torch.zeros(1, 3, 8, 8), ["a {highest} {prompt} {x} %s \\1"])
    assert "a {highest} {prompt} {x} %s \\1\n" in model.requests[0]["messages"][0]["content"][1]["text"]
    assert "from 1 (bad) to 5 (excellent)" in model.requests[0]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Final Score: 4", 0.8),
        ("**Final Score:** 4.5", 0.9),
        ("I think of Final Score: 2 first.\nFinal score = 3", 0.6),
        ("final score: 1", 0.2),
        ("Final Score: 0", None),
        ("Final Score: 5.5", None),
        ("Final Score: -3", None),
        ("Final Score: 99999999999999999999999", None),
        ("Final Score: great", None),
        ("The score is 4", None),
        ("", None),
    ],
)
def test_an_answer_without_a_score_is_missing_not_0(model: Model, answer: str, expected: float | None) -> None:
    assert judge(model).read(answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "reply",
    [None, {}, {"choices": []}, {"choices": [{"message": {"content": [1]}}]}, {"error": "overloaded"}, "no idea"],
)
def test_an_unusable_reply_is_missing(model: Model, reply: Any) -> None:
    answers = iter(["Final Score: 5", reply])
    model.answer = lambda request: next(answers)
    found = scores(judge(model, concurrency=1), torch.zeros(2, 3, 8, 8), ["a", "b"])
    assert found == [1.0, None] and len(model.requests) == 2


def test_another_scale_and_pattern(model: Model) -> None:
    reward = judge(model, lowest=0.0, highest=10.0, pattern=r"<s>(\d+)</s>", question="Rate {prompt} to {highest}")
    model.answer = lambda request: "<s>7</s>"
    assert scores(reward, torch.zeros(1, 3, 8, 8), ["x"]) == [pytest.approx(0.7)]
    assert model.requests[0]["messages"][0]["content"][1]["text"] == "Rate x to 10"


def test_the_model_is_looked_for_at_once(model: Model) -> None:
    with pytest.raises(OSError, match="expected the model 'jugde' there, found judge, other"):
        judge(model, model="jugde")
    model.models = (401, {"error": "who are you"})
    with pytest.raises(OSError, match="status 401"):
        judge(model)
    model.models = (404, {})
    assert scores(judge(model), torch.zeros(1, 3, 8, 8), ["x"]) == [pytest.approx(0.8)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lowest": 5.0}, "expected lowest < highest"),
        ({"lowest": -5.0, "highest": 0.0}, "above 0"),
        ({"question": "Is it good?"}, "{prompt}"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": "score"}, "expected a group"),
        ({"url": "host"}, "starts with http"),
    ],
)
def test_options_out_of_range_are_refused(model: Model, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        judge(model, **options)
    assert problem in str(caught.value)
