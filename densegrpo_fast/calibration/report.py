"""What the calibrate command shows and writes: a table, the file for training, and a plot of the gains of each step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.calibration.rules import Round, Rule, Signs
from densegrpo_fast.calibration.store import DIGEST, FORMAT
from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.files import replace_bytes, replace_text
from densegrpo_fast.common.fingerprint import fingerprint

if TYPE_CHECKING:
    from densegrpo_fast.credit.consistency import StepConsistency

MEANINGS = {
    "flow_sde": "a, sigma_t = a sqrt(t / (1 - t))",
    "dance": "sigma_t",
    "wan": "a, sigma_t = a (t_T + (t_1 - t_T) t)",
    "cps": "a, std = t' sin(a pi / 2)",
    "precise": "a, std = t' sqrt(1 - rho^2), rho^2 = (t' (1 - t) / (t (1 - t')))^(a^2)",
}
"""What a noise level is, by dynamics: a step goes from time t (sigma of the grid) to t'; t_k after k of T steps."""

LEGEND = """\
level      noise level of the step, before and after: {level}
sigma_t    of the SDE at that level: the injected standard deviation over sqrt(t - t'), a step going from t to t'
std        standard deviation of the injected noise
+ - 0      gains above, below and equal to 0, of samples that the calibration has not seen
imbalance  (positive - negative) / both; * = more than fair signs show by chance, 2 standard deviations
own        share of the gains' variance that the step's own noise makes, the rest belongs to the state it starts from
per noise  standard deviation that the own noise makes of the gains, over that of the noise itself
mirror     correlation of a gain with that of the opposite noise: -1 = a straight line, 0 = no slope to learn from"""


def round_record(measured: Round) -> dict[str, Any]:
    """A round as plain JSON data: levels, sign counts, mean and standard deviation of the gains, by step."""
    signs, judged = measured.signs, [[gain for gain in step if not math.isnan(gain)] for step in measured.gains]
    means = [sum(step) / len(step) if step else math.nan for step in judged]
    return {
        "noise_level": list(measured.levels),
        **{key: [getattr(count, key) for count in signs] for key in ("positive", "negative", "ties", "missing")},
        "mean_gain": means,
        "std_gain": [
            math.sqrt(sum((gain - mean) ** 2 for gain in step) / len(step)) if step else math.nan
            for step, mean in zip(judged, means, strict=True)
        ],
    }


def state_record(
    measured: Round, consistency: StepConsistency | None, injected_std: Sequence[float], sigmas: Sequence[float]
) -> dict[str, Any]:
    """One of the two held-out measurements: a round, the gains themselves, and what they owe to their step's noise.

    Args:
        measured, consistency: what was measured.
        injected_std: standard deviation of the noise that each step injects at these levels, T numbers.
        sigmas: the grid, T+1 numbers.
    """
    parts = None
    if consistency is not None:
        parts = {name: value.tolist() for name, value in vars(consistency).items()}
    steps = [before - after for before, after in pairwise(sigmas)]
    noise = {
        "sigma_t": [std / math.sqrt(dt) for std, dt in zip(injected_std, steps, strict=True)],
        "injected_std": list(injected_std),
    }
    gains = [list(step) for step in measured.gains]
    return round_record(measured) | noise | {"gains": gains, "consistency": parts}


def document(
    rule: Rule,
    sampler: Mapping[str, Any],
    rounds: Sequence[Round],
    before: dict[str, Any],
    after: dict[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The file's content, without its provenance.

    Args:
        rule: after its last round.
        sampler: dynamics, num_steps, steps (those with noise to calibrate), sigmas.
        rounds: what it saw.
        before, after: as from `state_record`, at the levels at the start and those found.
        settings: what a reader must know to repeat the calibration; plain JSON data.
    """
    return {
        "format": FORMAT,
        **sampler,
        "noise_level_is": MEANINGS[sampler["dynamics"]],
        "noise_level": list(rule.result),
        "settled": rule.settled,
        "unbalanceable": list(rule.unbalanceable),
        "rule": rule.describe(),
        "settings": dict(settings),
        "before": before,
        "after": after,
        "rounds": [round_record(measured) for measured in rounds],
    }


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a calibration's file; NaN becomes null, and numbers but sigmas and levels keep six digits.

    Raises:
        OutputError: if it cannot be written.
    """
    short = {key: value if key in ("sigmas", "noise_level") else _short(value) for key, value in content.items()}
    written = json.loads(json.dumps(short))
    lines = ",\n".join(
        f"{json.dumps(key)}: {_indented(value)}" for key, value in {**short, DIGEST: fingerprint(written)}.items()
    )
    replace_text(path, f"{{\n{lines}\n}}\n")


def table(content: Mapping[str, Any]) -> str:
    """Before and after, one line per calibrated step."""
    before, after = content["before"], content["after"]
    header = [
        "step",
        "t",
        "level",
        "after",
        "sigma_t",
        "after",
        "std",
        "after",
        "+ - 0 before",
        "after",
        "imbalance",
        "after",
        "own",
        "after",
        "per noise",
        "after",
        "mirror",
        "after",
    ]
    lines = [header]
    for step in content["steps"]:
        counts, shares = [], []
        parts: dict[str, list[str]] = {"own_share": [], "sensitivity": [], "mirror": []}
        for state in (before, after):
            signs = _signs(state, step)
            counts.append(f"{signs.positive} {signs.negative} {signs.ties}")
            shares.append(f"{signs.imbalance:+.2f}{'*' if is_imbalanced(signs) else ' '}" if signs.decided else "- ")
            for key, cells in parts.items():
                value = state["consistency"][key][step] if state["consistency"] else math.nan
                cells.append("-" if math.isnan(value) else f"{value:.2f}")
        keys = {"noise_level": 2, "sigma_t": 3, "injected_std": 3}
        noise = [f"{state[key][step]:.{digits}f}" for key, digits in keys.items() for state in (before, after)]
        told = [cell for cells in parts.values() for cell in cells]
        lines.append([str(step), f"{content['sigmas'][step]:.4f}", *noise, *counts, *shares, *told])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def legend(content: Mapping[str, Any]) -> str:
    """What the columns of `table` mean."""
    return LEGEND.format(level=MEANINGS[content["dynamics"]])


def noise_label(content: Mapping[str, Any]) -> str:
    """Of the axis that noise levels are drawn on."""
    return f"level of the step: {MEANINGS[content['dynamics']]}"


def is_imbalanced(signs: Signs) -> bool:
    """Whether the signs differ by more than two standard deviations of fair ones."""
    return abs(signs.excess) > 2 * math.sqrt(signs.decided)


def summary(content: Mapping[str, Any]) -> str:
    """Which steps were and are out of balance, and whether the rule has come to an end."""
    imbalanced = []
    for when in ("before", "after"):
        out = [step for step in content["steps"] if is_imbalanced(_signs(content[when], step))]
        imbalanced.append(f"{when} {', '.join(map(str, out)) or 'none'}")
    ended = "had settled" if content["settled"] else "had not settled"
    told = (
        f"the {content['rule']['name']} rule {ended} after {len(content['rounds'])} rounds; "
        f"steps out of balance: {'; '.join(imbalanced)}"
    )
    if content["unbalanceable"]:
        steps = ", ".join(map(str, content["unbalanceable"]))
        told += f"\nno level balances {steps}: kept where the search began"
    return told


def save_plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw every gain of each step before and after, with counts of their signs, and the noise levels, as a PNG.

    After Figure 3 of DenseGRPO.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = figure_class()(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[1].sharey(axes[0])
    for axis, when in zip(axes, ("before", "after"), strict=False):
        _draw_gains(axis, content[when], content["steps"])
        axis.set(title=f"gains {when}", xlabel="step", ylabel="reward gain" if when == "before" else None)
    for when, colour in (("before", "#9aa0a6"), ("after", "#0072b2")):
        levels = [content[when]["noise_level"][step] for step in content["steps"]]
        axes[2].plot(content["steps"], levels, "o-", color=colour, markersize=4, label=when)
    axes[2].set(title=f"noise level, {content['dynamics']}", xlabel="step", ylabel=noise_label(content), ylim=(0, None))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_xticks(content["steps"])
        axis.grid(alpha=0.25)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    replace_bytes(path, buffer.getvalue())


def figure_class() -> Any:
    """matplotlib's Figure.

    Raises:
        UserError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SetupError("--plot needs matplotlib: pip install densegrpo-fast[train], or leave --plot out") from None
    return Figure


def _draw_gains(axis: Any, state: Mapping[str, Any], steps: Sequence[int]) -> None:
    for step in steps:
        judged = [gain for gain in state["gains"][step] if not math.isnan(gain)]
        # samples side by side, in their order: no gain hides another, and the same data make the same picture
        places = [step + 0.6 * ((number + 0.5) / len(judged) - 0.5) for number in range(len(judged))]
        colours = ["#0072b2" if gain > 0 else "#d55e00" if gain < 0 else "#9aa0a6" for gain in judged]
        axis.scatter(places, judged, s=5, c=colours, linewidths=0)
        signs = _signs(state, step)
        axis.annotate(
            f"+{signs.positive}\n\N{MINUS SIGN}{signs.negative}",
            (step, 1),
            (0, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
        )
    axis.axhline(0, color="#9aa0a6", linewidth=0.8)
    axis.margins(y=0.2)


def _signs(state: Mapping[str, Any], step: int) -> Signs:
    return Signs(**{key: state[key][step] for key in asdict(Signs(0, 0))})


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _indented(value: Any, depth: int = 1) -> str:
    """JSON with lists of plain values on one line each."""
    nested = isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(item, list | Mapping) for item in value)
    )
    if not nested or not value:
        return json.dumps(value, allow_nan=False)
    keys = [f"{json.dumps(key)}: " for key in value] if isinstance(value, Mapping) else [""] * len(value)
    items = value.values() if isinstance(value, Mapping) else value
    lines = [f"{' ' * depth}{key}{_indented(item, depth + 1)}" for key, item in zip(keys, items, strict=True)]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}{closing}"
