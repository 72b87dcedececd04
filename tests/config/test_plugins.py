"""Code from outside of the package, by the name that an option gives it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from densegrpo_fast.common.plugins import is_outside, load


@pytest.mark.parametrize("name", ["m:f", "a.b:F_1", "dir/file.py:f", "C with space/x.py:f"])
def test_the_two_forms(name: str) -> None:
    assert is_outside(name)


@pytest.mark.parametrize("name", ["dense", "", ":f", "m:", "m:1f", "a:b:c", "m:f.g", " m:f", "m: f"])
def test_other_names(name: str) -> None:
    assert not is_outside(name)


def test_a_module_by_its_name() -> None:
    assert load("os.path:join") is __import__("os").path.join


def test_files_of_one_name_are_kept_apart_and_may_hold_dataclasses(tmp_path: Path) -> None:
    loaded = []
    for number in (1, 2):
        path = tmp_path / str(number) / "mine.py"
        path.parent.mkdir()
        path.write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass, KW_ONLY\n"
            "@dataclass\n"
            f"class Mine:\n    _: KW_ONLY\n    x: int = {number}\n"
        )
        loaded.append(load(f"{path}:Mine"))
    assert [kind(x=kind().x + 10).x for kind in loaded] == [11, 12]
    assert len({kind.__module__ for kind in loaded}) == 2
    assert all(sys.modules[kind.__module__].Mine is kind for kind in loaded)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all\n")
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"cannot load .*broken\.py: ModuleNotFoundError: .*no_such_module_at_all"):
        load(f"{path}:f")
    assert set(sys.modules) == before
    path.write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"broken\.py: SyntaxError"):
        load(f"{path}:f")
    with pytest.raises(ValueError, match=r"os\.path:nothing: os\.path holds no 'nothing'"):
        load("os.path:nothing")
