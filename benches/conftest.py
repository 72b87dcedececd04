"""What a document of `--benchmark-json` says of the machine, beside pytest-benchmark's own words."""

from __future__ import annotations

from typing import Any

from benches.common.record import hardware


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info["hardware"] = hardware()
