"""Rows at a time from a memory budget, against the bytes of the tensors that real forwards and decodes hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.models.memory import peak_bytes
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.training.lookahead import GB, Chunks, Linear, lookahead_chunks
from densegrpo_fast.training.meter import Meter, MeteredModel


def configured(memory_gb: float | None, chunk: int = 64) -> Config:
    value = "null" if memory_gb is None else repr(memory_gb)
    return parse_arguments([f"--lookahead.memory_gb={value}", f"--lookahead.chunk={chunk}", "--lora.rank=2"])[0]


@torch.no_grad()
def measured(model: FlowModel, rows: int, decoder: Decoder) -> tuple[int, int]:
    """Most bytes of CPU tensors alive at a time in a forward and in a decode of so many rows."""
    latents, conditioning = torch.zeros(rows, *model.latent_shape), model.encode(["a cat"] * rows)
    forward = peak_bytes(lambda: model.velocity(latents, torch.full((rows,), 0.5), conditioning).combined())
    return forward, peak_bytes(lambda: model.decode(latents, decoder))


@pytest.mark.ci
@pytest.mark.parametrize("decoder", ["full", "preview"])
def test_the_rows_fill_the_budget_and_no_more(tiny_policy: Callable[..., FlowModel], decoder: Decoder) -> None:
    model = tiny_policy()
    for budget in (3e-3, 12e-3):
        rows = lookahead_chunks(configured(budget, chunk=10**6), model, decoder)
        assert rows.forward > 1 and rows.decode > 1
        for used in (measured(model, rows.forward, decoder)[0], measured(model, rows.decode, decoder)[1]):
            # within a tenth of what was given
            assert 0.85 * budget * GB < used < 1.1 * budget * GB


@pytest.mark.ci
def test_a_chunk_is_never_more_than_asked_for(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy()
    for counted in (model, MeteredModel(model, Meter())):
        assert lookahead_chunks(configured(100.0, chunk=7), counted, "full") == Chunks(7, 7)
    assert lookahead_chunks(configured(None, chunk=7), model, "full") == Chunks(7, 7)


@pytest.mark.ci
def test_a_budget_too_small_for_one_row_names_the_way_out(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy()
    with pytest.raises(UserError, match=r"lookahead.memory_gb: 1e-06 is too small for one row") as caught:
        lookahead_chunks(configured(1e-6), model, "full")
    assert exit_code_of(caught.value) == ExitCode.USAGE
    found = re.search(r"expected at least ([0-9.e+-]+), or null and lookahead.chunk 1", str(caught.value))
    assert found is not None
    # what the message asks for is enough, and for one row
    assert min(vars(lookahead_chunks(configured(float(found[1])), model, "full")).values()) == 1


def test_a_model_that_cannot_be_counted(mixture_model: FlowModel) -> None:
    assert lookahead_chunks(configured(None, chunk=3), mixture_model, "full") == Chunks(3, 3)
    with pytest.raises(UserError, match="lookahead.memory_gb: expected null"):
        lookahead_chunks(configured(1.0), mixture_model, "full")


def test_a_line_by_hand() -> None:
    """100 bytes for one row, 160 for two: 40 + 60 a row."""
    line = Linear.through({1: 100, 2: 160}.__getitem__)
    assert line.at(3) == 220
    assert [line.largest(limit) for limit in (0, 100, 159, 160, 220)] == [1, 1, 1, 2, 3]
    assert Linear.through(lambda rows: 5).largest(6) > 10**6


@pytest.mark.ci
@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_a_budget_changes_rounding_alone(train: Any, tmp_path: Path, method: str) -> None:
    options = {"run.iterations": 1, "evaluation.every": 0, "credit.method": method, "lookahead.monitor_every": 1}
    for name, budget in (("free", "null"), ("tight", "0.006")):
        assert train(tmp_path / name, **options, **{"lookahead.memory_gb": budget}) == 0
    free, tight = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("free", "tight"))
    assert tight["reward"] == pytest.approx(free["reward"], abs=2e-3)
    assert tight["nfe/lookahead"] == free["nfe/lookahead"]


@pytest.mark.ci
def test_training_refuses_a_budget_below_one_row(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", **{"lookahead.memory_gb": 1e-5}) == ExitCode.USAGE
    assert "too small for one row" in capsys.readouterr().err
