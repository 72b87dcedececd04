from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.common.exit_codes import OF_SIGNALS, ExitCode
from densegrpo_fast.run_files.signals import GracefulStop


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
def test_the_first_signal_sets_a_flag_with_its_exit_code(number: signal.Signals, code: ExitCode) -> None:
    with GracefulStop() as stop:
        assert not stop.requested
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal is not None and OF_SIGNALS[stop.signal] == code


def test_the_exit_codes_are_the_documented_numbers() -> None:
    assert (int(ExitCode.TERMINATED), int(ExitCode.INTERRUPTED)) == (75, 130)


def test_the_same_request_delivered_twice_is_one_request() -> None:
    now = [10.0]
    with GracefulStop(clock=lambda: now[0]) as stop:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is not None and OF_SIGNALS[stop.signal] == ExitCode.TERMINATED


def test_the_earlier_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(RuntimeError), GracefulStop():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    script = (
        "import signal\n"
        "from densegrpo_fast.run_files.signals import GracefulStop\n"
        "now = [0.0]\n"
        "with GracefulStop(clock=lambda: now[0]) as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('first', stop.requested, flush=True)\n"
        "    now[0] = 2.0\n"
        f"    signal.raise_signal({int(second)})\n"
        "    print('still here', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert result.stdout == "first True\n"
    assert result.returncode == -second
