"""All findings about this machine, gathered so that a missing package is a finding and not a crash."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.doctor import implementations, machine, packages
from densegrpo_fast.doctor.findings import Finding

_CONFIGURATION = ("pydantic", "yaml")


def examine(arguments: Sequence[str], wait_policy: str | None) -> list[Finding]:
    """Everything that can be said without loading a model.

    Args:
        arguments: configuration on the command line, whose run directory is examined.
        wait_policy: OMP_WAIT_POLICY as the user has it; None = unset.

    Raises:
        UsageError: if the configuration is wrong.
    """
    findings = list(packages.package_findings())
    if packages.installed_version("torch") is not None:
        import torch

        from densegrpo_fast.flow import backends

        findings += machine.gpu_findings(backends.MINIMUM_CAPABILITY)
        findings += implementations.op_findings()
        findings += implementations.attention_findings()
        findings += machine.compiler_findings(implementations.triton_serves())
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        findings += machine.thread_findings(wait_policy, machine.usable_cores(), torch.get_num_threads(), load)
    try:
        findings += _configured(arguments)
    except ModuleNotFoundError as error:
        if error.name not in _CONFIGURATION:
            raise
        if arguments:
            raise SetupError(f"options of a run need {error.name}: pip install densegrpo-fast[train]") from None
        findings.append(machine.disk_finding(Path("runs")))
    return findings


def _configured(arguments: Sequence[str]) -> list[Finding]:
    from densegrpo_fast.config.cli import parse_arguments
    from densegrpo_fast.config.yaml_files import preset_names
    from densegrpo_fast.embedded import EMBEDDED

    config, _ = parse_arguments(arguments)
    data = packages.data_findings(lambda name: parse_arguments(["--config", name]), list(preset_names()), EMBEDDED)
    return [machine.disk_finding(config.output_dir), *data]
