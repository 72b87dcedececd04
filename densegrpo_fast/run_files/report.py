"""The run's report: one HTML file with everything inside, to be opened anywhere, offline, years later.

It reads a run's numbers and pictures and shows: what was run, the held-out reward before and after, curves,
where time and network evaluations went, pictures before and after, and the settings. No script and no
request: a content security policy in the page forbids both.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from densegrpo_fast.run_files.curves import line_chart
from densegrpo_fast.run_files.images import read_captions
from densegrpo_fast.run_files.report_style import PAGE, STYLE

Record = Mapping[str, Any]

_CURVES = (
    ("Training reward", ("reward",), "mean over the iteration's samples, drawn with exploration noise"),
    ("Held-out reward", ("eval/reward", "eval/strict"), "prompts never trained on, noise-free sampler"),
    ("Reward spread", ("reward_std",), "standard deviation within a group, mean over groups; 0 teaches nothing"),
    (
        "Clip fraction",
        ("clip_fraction", "clip_ratio/region_mean"),
        "ratios outside the clip range, and those whose gradient it cuts off; steadily above 0.5 is too high",
    ),
    (
        "Ratio deviation",
        ("ratio_deviation", "first_ratio_deviation"),
        "largest |ratio - 1|, of all updates and of the first, which is rounding only",
    ),
    ("Approximate KL to the sampling policy", ("approx_kl",), "mean of ratio - 1 - log ratio"),
    ("KL to the reference policy", ("kl",), "how far the adapter has moved the model"),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    (
        "Zero-spread share",
        ("frac_reward_zero_std",),
        "groups (or group steps) without a preference; their advantage is 0",
    ),
    (
        "Agreement with the exact lookahead",
        ("monitor/spearman_rewards", "monitor/spearman_gains"),
        "rank correlation within one prompt's samples, of the iterations that are scored again exactly",
    ),
    ("Missing scores", ("reward_missing",), "share of the scores that the reward could not give"),
)
_COST_COLUMNS = ("Phase", "Seconds", "Share", "Seconds per iteration", "NFE per iteration")
_WORK = (
    ("decodes/full", "{} full decodes"),
    ("decodes/preview", "{} preview decodes"),
    ("pictures_scored", "{} pictures scored"),
    ("flops/iteration", "{} GFLOP"),
    ("flops/over_sparse", "{} times the operations of one with a single reward per image"),
)
_FACTS = (
    ("Preset", "preset"),
    ("Model", "model.path"),
    ("Prompts per iteration", "data.num_prompts"),
    ("Group size", "sampler.group_size"),
    ("Steps", "sampler.num_steps"),
    ("Dynamics", "sampler.dynamics"),
    ("Noise level", "sampler.noise_level"),
    ("Guidance scale", "sampler.guidance_scale"),
    ("Credit", "credit.method"),
    ("Lookahead plan", "lookahead.plan"),
    ("Seed", "seed"),
)


def write_report(
    run_dir: str | Path,
    *,
    config_yaml: str,
    metrics: Sequence[Record],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    images: Mapping[str, str | Path],
    phases: Mapping[str, float],
    change: Mapping[str, Any] | None = None,
    advice: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html` into a run directory.

    Args:
        run_dir: the run directory; its name is the title.
        config_yaml: the resolved settings as YAML text.
        metrics: one record per iteration, as in metrics.jsonl; absent keys leave their curve or cell out.
            METRICS.md has their meaning.
        before: held-out metric -> (mean, low, high) as `mean_interval` gives them, or a plain mean.
        after: the same metrics after training.
        images: title -> PNG file of `save_grid`, shown in this order with the prompts stored in it.
        phases: phase -> seconds over the whole run, in display order. A phase's network evaluations are the
            mean of nfe/PHASE over the records.
        change: metric -> (mean, low, high) of after - before as `paired_interval` gives it.
        advice: alarm -> what it means and what to do, for the alarms in the records.

    Returns:
        Path of the file, which replaces an older one atomically.
    """
    run_dir = Path(run_dir)
    name = escape(run_dir.resolve().name)
    body = "".join(
        (
            f"<header><h1>{name}</h1>{_summary(config_yaml, metrics, phases)}</header>",
            _headline(before, after, change or {}),
            _section("Alarms", _alarms(metrics, advice or {})),
            _section("Curves", f'<div class="charts">{"".join(_charts(metrics))}</div>' if metrics else ""),
            _section("Cost", _costs(metrics, phases)),
            _section("Pictures", "".join(_picture(title, Path(path)) for title, path in images.items())),
            _section(
                "Settings",
                f"<details><summary>All settings</summary><pre>{escape(config_yaml)}</pre></details>",
            ),
        )
    )
    path = run_dir / "report.html"
    unfinished = path.with_suffix(".html.part")
    unfinished.write_text(PAGE.format(title=name, style=STYLE, body=body), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _summary(config_yaml: str, metrics: Sequence[Record], phases: Mapping[str, float]) -> str:
    settings = yaml.safe_load(config_yaml)
    facts = [(label, _lookup(settings, key)) for label, key in _FACTS]
    facts = [("Iterations", _iterations(metrics)), ("Time", _duration(sum(phases.values()))), *facts]
    items = "".join(
        f"<div><dt>{label}</dt><dd>{escape(_plain(value))}</dd></div>" for label, value in facts if value is not None
    )
    return f"<p>Reinforcement learning of a flow-matching model from rewards.</p><dl>{items}</dl>"


def _lookup(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _headline(before: Mapping[str, Any], after: Mapping[str, Any], change: Mapping[str, Any]) -> str:
    cards = []
    for name in dict.fromkeys([*before, *after]):
        moved = f'<p class="change">change {_with_interval(change[name], sign=True)}</p>' if name in change else ""
        cards.append(
            f'<div class="card"><h3>Held-out {escape(name)}</h3><div class="pair">'
            f"<div><span>before</span>{_figure_of(before.get(name))}</div><b>→</b>"
            f"<div><span>after</span>{_figure_of(after.get(name))}</div></div>{moved}</div>"
        )
    return _section("Result", f'<div class="cards">{"".join(cards)}</div>') if cards else ""


def _alarms(metrics: Sequence[Record], advice: Mapping[str, str]) -> str:
    found: dict[str, list[Any]] = {}
    for index, record in enumerate(metrics):
        for name in record.get("alarms", ()):
            found.setdefault(name, []).append(record.get("iteration", index))
    items = "".join(
        f"<li><b>{escape(name)}</b>: {len(when)} of {_iterations(metrics)} iterations, first in iteration {when[0]}. "
        f"{escape(advice.get(name, ''))}</li>"
        for name, when in found.items()
    )
    return f'<ul class="alarms">{items}</ul>' if items else ""


def _figure_of(value: Any) -> str:
    mean, interval = _split(value)
    return f"<strong>{_number(mean)}</strong><small>{_range(interval) or '&nbsp;'}</small>"


def _with_interval(value: Any, *, sign: bool) -> str:
    mean, interval = _split(value)
    return f"<strong>{_number(mean, sign=sign)}</strong> {_range(interval)}"


def _split(value: Any) -> tuple[float, tuple[float, float]]:
    if value is None:
        return math.nan, (math.nan, math.nan)
    if isinstance(value, Iterable):
        mean, low, high = value
        return float(mean), (float(low), float(high))
    return float(value), (math.nan, math.nan)


def _range(interval: tuple[float, float]) -> str:
    return f"95% {_number(interval[0])} to {_number(interval[1])}" if all(map(math.isfinite, interval)) else ""


def _charts(metrics: Sequence[Record]) -> list[str]:
    charts = [line_chart(title, {key: _points(metrics, key) for key in keys}, note) for title, keys, note in _CURVES]
    steps = sorted({key for record in metrics for key in record if key.startswith("gain/step_")}, key=_step_number)
    gains = line_chart(
        "Reward gain per step",
        {f"step {_step_number(key)}": _points(metrics, key) for key in steps},
        "what each denoising step adds to the reward of the lookahead image; step 0 starts from pure noise",
        ordered=True,
    )
    return [chart for chart in (*charts[:2], gains, *charts[2:]) if chart]


def _step_number(key: str) -> int:
    return int(key.removeprefix("gain/step_"))


def _points(metrics: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [
        (record.get("iteration", index), record[key])
        for index, record in enumerate(metrics)
        if isinstance(record.get(key), (int, float))
    ]


def _iterations(metrics: Sequence[Record]) -> int:
    # records of an evaluation alone, as before the first iteration, have no training reward
    return sum("reward" in record for record in metrics)


def _costs(metrics: Sequence[Record], phases: Mapping[str, float]) -> str:
    total = sum(phases.values())
    if not total > 0:
        return ""
    iterations = max(_iterations(metrics), 1)
    rows, bars = [], []
    for index, (phase, seconds) in enumerate(phases.items()):
        evaluations = [y for _, y in _points(metrics, f"nfe/{phase}")]
        nfe = f"{sum(evaluations) / len(evaluations):,.1f}".removesuffix(".0") if evaluations else "–"
        share, colour = seconds / total, f"var(--phase-{index % 6})"
        rows.append(
            f'<tr><th scope="row"><i style="background:{colour}"></i>{escape(phase)}</th>'
            f"<td>{seconds:.1f}</td><td>{share:.1%}</td><td>{seconds / iterations:.3f}</td>"
            f"<td>{nfe}</td></tr>"
        )
        hint = f"{escape(phase)} {share:.1%}"
        bars.append(f'<i style="width:{100 * share:.2f}%;background:{colour}" title="{hint}"></i>')
    head = "".join(f'<th scope="col">{column}</th>' for column in _COST_COLUMNS)
    return (
        f'<div class="bar">{"".join(bars)}</div>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p><small>NFE: network evaluations as the run counted them. "
        f"Phases that run only in some iterations are spread over all of them.{_work(metrics)}</small></p>"
    )


def _work(metrics: Sequence[Record]) -> str:
    """A sentence on what an iteration decodes, scores and computes on average; empty if no record says."""
    found = []
    for key, words in _WORK:
        values = [y for _, y in _points(metrics, key)]
        if values and any(values):
            found.append(words.format(_number(sum(values) / len(values))))
    return f" An iteration has on average {', '.join(found)}." if found else ""


def _picture(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    prompts = read_captions(path)
    listed = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    details = f"<details><summary>Prompts, in reading order</summary><ol>{listed}</ol></details>"
    return (
        f'<figure class="picture"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<img alt="{escape(title)}: grid of pictures" src="data:image/png;base64,{data}">'
        f"{details if listed else ''}</figure>"
    )


def _number(value: float, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign else f"{value:.4g}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
