"""What is counted of an iteration, on a package of three files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benches.iteration.trace import Tracer, count, listing

FILES = {
    "prompts.py": "def batch(): return one()\ndef one(): return 1\n",
    "learner.py": "class Learner:\n    def update(self, loss): return loss() + loss()\n",
    "loss.py": "def loss(): return part()\ndef part(): return 2\n",
}


def test_from_the_prompts_to_the_end_of_the_update(tmp_path: Path) -> None:
    modules: dict[str, Any] = {}
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
        spec = importlib.util.spec_from_file_location(f"traced_{name}", tmp_path / name)
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    learner = modules["learner.py"].Learner()
    with Tracer(tmp_path) as tracer:
        modules["loss.py"].loss()  # before the iteration
        assert modules["prompts.py"].batch() == 1
        assert learner.update(modules["loss.py"].loss) == 4
        modules["loss.py"].loss()  # after it
    (events,) = threads = list(tracer.events.values())
    # batch, one; update with twice loss and part; a call and a return each
    assert len(events) == 2 * (2 + 1 + 4)
    # to the learner, to the loss, and back; between the two losses the learner is silent
    assert count(threads) == {"files": 3, "functions": 5, "depth": 3, "changes": 3}
    lines = listing(threads, tmp_path).splitlines()
    assert lines[1].split() == ["1", "1", "2", "learner.py"]
    assert "learner.py -> loss.py" in lines[-1] or "loss.py -> learner.py" in lines[-1]
