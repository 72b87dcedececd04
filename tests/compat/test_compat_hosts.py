"""The table of hosts: its signatures can be read, and functions made of them take their arguments as Python does."""

from __future__ import annotations

import importlib
from inspect import Parameter, signature
from typing import Any

import pytest

from densegrpo_fast.compat.hosts import HOSTS, SIGNATURES, signature_of
from densegrpo_fast.compat.steps import as_host


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_read(name: str) -> None:
    for version, text in SIGNATURES[name].items():
        parameters = signature_of(name, version).parameters.values()
        assert all(parameter.kind is Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
        namespace: dict[str, Any] = {}
        exec(f"def function({text}): ...", namespace)
        assert signature(namespace["function"]) == signature_of(name, version)


@pytest.mark.parametrize("host", HOSTS)
def test_each_host_has_a_module(host: str) -> None:
    module = importlib.import_module(f"densegrpo_fast.compat.{host}")
    assert {"install", "uninstall", "FIXES", "CompatError"} <= set(module.__all__)
    assert module.FIXES == HOSTS[host].fixes
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def test_arguments_by_place_and_by_name() -> None:
    def body(scheduler: str, **options: Any) -> tuple[str, dict[str, Any]]:
        return scheduler, options

    step = as_host(body, "Class.step", signature_of("sde_step_with_logprob", "V2"))
    assert (step.__name__, step.__qualname__, step.__module__) == ("step", "Class.step", __name__)
    options = {"model_output": 1, "timestep": 2, "sample": 3, "noise_level": 0.7, "prev_sample": 4, "generator": None}
    assert step("self", 1, 2, 3, prev_sample=4) == step(self="self", **options) == ("self", options)
    assert step("self", 1, 2, 3, 0.7, 4, None) == ("self", options)
    for args, kwargs, message in [
        ((0, 1, 2), {}, "missing a required argument: 'sample'"),
        ((0, 1, 2, 3), {"sample": 3}, "multiple values for argument 'sample'"),
        ((0, 1, 2, 3), {"eta": 3}, "unexpected keyword argument 'eta'"),
        ((0, 1, 2), {"eta": 3}, "missing a required argument: 'sample'"),
        ((0, 1, 2, 3, 4, 5, 6, 7), {}, "too many positional arguments"),
    ]:
        with pytest.raises(TypeError, match=message):
            step(*args, **kwargs)
