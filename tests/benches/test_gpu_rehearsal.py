"""The rehearsal of a GPU run: its arithmetic, and itself on a small model."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benches.gpu import rehearsal
from benches.gpu.host_syncs import HostSyncs
from benches.gpu.sensors import Sensors
from benches.iteration.protocol import Protocol
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.flops import ModelFlops
from densegrpo_fast.sampling.cost import dense_iteration
from densegrpo_fast.sampling.plan import nodes


def test_operations_by_phase() -> None:
    # 10 guided steps, 9 trained, KL; nodes {4, 7} without guidance: 7 states pass 7 and 4 of them pass 4, 11 forwards
    cost = dense_iteration(nodes(10, [4, 7]), trained_steps=9, guided=True, kl=True, guidance="cond_only")
    unit = ModelFlops(
        forward=1.0, reference_forward=10.0, backward=100.0, full_decode=1e3, preview_decode=float("nan"), reward=1e4
    )
    assert rehearsal.operations(cost, unit, checkpointing=False) == {
        "rollout": 20.0,
        "lookahead": 11.0,
        "reward": 11 * (1e3 + 1e4),
        "update": 18 * 1.0 + 18 * 100.0 + 18 * 10.0,
    }
    again = rehearsal.operations(cost, unit, checkpointing=True)
    assert again["update"] == 18 + 1800 + 180 + 18


def test_the_matmul_rate_is_a_rate() -> None:
    # between a slow core and a fast machine
    assert 1e7 < rehearsal.matmul_rate(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15


@pytest.mark.ci
def test_three_iterations_on_a_small_model(
    tiny_policy: Callable[..., DiffusersModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_policy()
    monkeypatch.setattr(rehearsal, "load", lambda config, device: made)
    rate = rehearsal.matmul_rate
    monkeypatch.setattr(rehearsal, "matmul_rate", lambda device, dtype: rate(device, dtype, 0.02))
    output = tmp_path / "rehearsal.json"
    arguments = ["--model", "embedded_random", "--prompts", "1", "--group-size", "2", "--warmup", "0"]
    assert rehearsal.main([*arguments, "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    phases = {"rollout", "lookahead", "reward", "update"}
    for key in ("seconds", "flops", "tflops_per_second", "share_of_matmul"):
        assert set(document[key]) == phases
    assert all(len(own["rounds"]) == 3 for own in document["seconds"].values())
    # a trunk of 9 guided steps, trained with their reference; 2 branches' 9 states, and 7 + 6 + ... + 1 to complete
    assert document["nfe"] == {"rollout": 18, "lookahead": 2 * 2 * (9 + 28), "update": 36}
    for phase in phases - {"reward"}:
        expected = document["flops"][phase] / document["seconds"][phase]["median"] / 1e12
        assert document["tflops_per_second"][phase] == pytest.approx(expected)
    assert document["memory"]["peak_bytes"] > 0 and document["memory"]["estimate_bytes"] > 0
    assert document["sensors"] == {"readings": None, "why_not": "no GPU"}
    assert document["host_syncs"] is None and document["joules_per_iteration"] is None
    assert document["bar"] == {"share": 0.45, "met": None}
    assert "commit" in document and "hardware" in document
    assert "of matmul" in capsys.readouterr().out


def test_it_needs_a_gpu_for_the_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stop:
        rehearsal.main([])
    assert stop.value.code == 3
    assert "needs a CUDA device" in capsys.readouterr().err


def test_sensors_are_read_while_something_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    watts, energy = iter(range(100_000, 10**9, 100_000)), iter([5_000, 12_000])
    asked = []
    library = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or "handle",
        nvmlDeviceGetPowerUsage=lambda handle: next(watts),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energy),
        nvmlDeviceGetClockInfo=lambda handle, clock: 1500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    with Sensors(torch.device("cuda"), seconds=0.001) as sensors:
        while len(sensors.readings) < 3:
            time.sleep(0.001)
    count = len(sensors.readings)
    summary = sensors.summary()
    assert sensors.joules == 7.0 and sensors.why_not is None
    assert asked == ["GPU-abc"] and summary is not None and summary["readings"] == count
    # 100 W, 200 W, ... up to the last reading
    assert summary["watts"] == {"mean": pytest.approx(50 * (count + 1)), "max": 100.0 * count}
    assert summary["sm_mhz"] == {"mean": 1500.0, "min": 1500.0}


def test_a_driver_that_stops_answering_ends_the_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    watts = iter([100_000.0, 200_000.0])
    library = SimpleNamespace(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: "handle",
        nvmlDeviceGetPowerUsage=lambda handle: next(watts),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000,
        nvmlDeviceGetClockInfo=lambda handle, clock: 1500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    with Sensors(torch.device("cuda"), seconds=0.001) as sensors:
        for _ in range(5000):
            if sensors.why_not is not None:
                break
            time.sleep(0.001)
    assert sensors.why_not == "after 2 readings: StopIteration: " and sensors.joules is None
    summary = sensors.summary()
    assert summary is not None and summary["watts"] == {"mean": 150.0, "max": 200.0}


def test_host_syncs_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning, match="another matter"), HostSyncs(torch.device("cuda")) as waits:
        for _ in range(3):
            # as torch does where an operation waits
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("another matter", stacklevel=1)
    assert modes == ["warn", 0]
    assert waits.where is not None and list(waits.where.values()) == [3, 1]
    assert all(place.startswith("test_gpu_rehearsal.py:") for place in waits.where)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_copy_to_the_host_is_a_host_sync() -> None:
    device = torch.device("cuda")
    numbers = torch.ones(4, device=device)
    with HostSyncs(device) as waits:
        numbers.sum().item()
    assert waits.where is not None and sum(waits.where.values()) == 1


def test_without_the_library_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Sensors(torch.device("cuda")) as sensors:
        pass
    assert sensors.summary() is None and sensors.why_not is not None and "pynvml" in sensors.why_not


def test_the_protocol_is_that_of_the_other_benches() -> None:
    config = Protocol(model="sd35_medium_random").config("dense_fast", kl=True)
    assert (config.model.height, config.lora.rank, config.sampler.num_steps) == (512, 32, 10)
