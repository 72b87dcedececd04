from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from densegrpo_fast.flow import backends, native, native_cuda


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (backends.ENVIRONMENT_VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


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


def on(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """What `choose` looks at of a tensor, for devices that are not here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, numel=lambda: 1)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(native_cuda, "why_not", lambda *tensors: "it was left out of this test")


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("op", sorted(backends.OPS))
def test_triton_serves_a_gpu(op: str) -> None:
    assert backends.choose(op, "auto", on("cuda"), on("cuda", torch.bfloat16)) == "triton"
    assert backends.choose(op, "auto", on("cuda"), on("cuda", torch.float64)) == "reference"


@pytest.mark.usefixtures("with_triton")
def test_triton_refuses_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: it needs tensors on a CUDA device"):
        backends.choose("sde_step", "triton", on("cpu"))
    with pytest.raises(RuntimeError, match="it computes in float32, got torch.float64"):
        backends.choose("sde_step", "triton", on("cuda", torch.float64))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match="it needs compute capability 8.0 or newer, got 7.5"):
        backends.choose("sde_step", "triton", on("cuda"))
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed; run pip install triton"):
        backends.choose("sde_step", "triton", on("cuda"))
    assert backends.choose("sde_step", "auto", on("cuda")) == "reference"


@pytest.mark.usefixtures("with_triton", "without_library")
def test_the_interpreter_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("sde_step", "auto", on("cpu")) == "reference"
    assert backends.choose("sde_step", "auto", on("cuda")) == "reference"
    assert backends.choose("sde_step", "triton", on("cpu")) == "triton"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "triton")
    assert backends.choose("sde_step", "auto", on("cpu")) == "triton"
    with pytest.raises(RuntimeError, match="it needs tensors on a CUDA device, got meta"):
        backends.choose("sde_step", "triton", on("meta"))


def test_describe_is_plain_and_complete() -> None:
    facts = json.loads(json.dumps(backends.describe()))
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) == set(backends.OPS)
    for reasons in facts["ops"].values():
        assert set(reasons) == set(backends.IMPLEMENTATIONS)
        assert reasons["reference"] == ""
