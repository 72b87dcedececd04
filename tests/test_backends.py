from __future__ import annotations

import json
import logging

import pytest
import torch

from densegrpo_fast.flow import backends, native


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "it was left out of this test")


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(1), "cpu"),
        (torch.zeros(1).bfloat16(), "reference"),
        (torch.zeros(1).double(), "reference"),
        (torch.zeros(1, device="meta"), "reference"),
    ],
    ids=["float32", "bfloat16", "float64", "other-device"],
)
def test_auto_takes_the_fastest_that_fits(tensor: torch.Tensor, expected: str) -> None:
    assert backends.choose("sde_step", "auto", tensor) == expected


@pytest.mark.usefixtures("with_library")
def test_every_tensor_of_the_call_counts() -> None:
    assert backends.choose("sde_step", "auto", torch.zeros(1), torch.zeros(1).half()) == "reference"


@pytest.mark.usefixtures("without_library")
def test_auto_goes_on_without_the_library() -> None:
    assert backends.choose("sde_step", "auto", torch.zeros(1)) == "reference"


@pytest.mark.usefixtures("with_library")
def test_the_environment_decides_when_the_argument_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert backends.choose("sde_step", "auto", torch.zeros(1)) == "reference"
    assert backends.choose("sde_step", "cpu", torch.zeros(1)) == "cpu"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="DENSEGRPO_IMPLEMENTATION must be one of auto, .* got 'fastest'"):
        backends.choose("sde_step", "auto", torch.zeros(1))


@pytest.mark.usefixtures("without_library")
def test_an_unavailable_choice_names_op_reason_and_way_out() -> None:
    message = "sde_step: implementation 'cpu' cannot serve this call: it was left out.*'auto' or one of: reference"
    with pytest.raises(RuntimeError, match=message):
        backends.choose("sde_step", "cpu", torch.zeros(1))
    with pytest.raises(RuntimeError, match="implementation 'cuda' .* it does not exist for euler_jump"):
        backends.choose("euler_jump", "cuda", torch.zeros(1))


@pytest.mark.usefixtures("with_library")
def test_a_wrong_dtype_is_the_reason() -> None:
    with pytest.raises(RuntimeError, match="it needs float32 tensors on the CPU, got torch.float16 on cpu"):
        backends.choose("sde_step", "cpu", torch.zeros(1).half())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation must be one of auto, reference, cpu, triton, cuda"):
        backends.choose("sde_step", "gpu", torch.zeros(1))


@pytest.mark.usefixtures("without_library")
def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            backends.choose("sde_log_prob", "auto", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == ["sde_log_prob on cpu: implementation reference"]


def test_describe_is_plain_and_complete() -> None:
    facts = json.loads(json.dumps(backends.describe()))
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(backends.OPS)
    for reasons in facts["ops"].values():
        assert set(reasons) == set(backends.IMPLEMENTATIONS)
        assert reasons["reference"] == ""
