"""The report's page and style sheet: system fonts, light and dark paper, prints well."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>{body}</main></body>
</html>
"""
"""Takes title, style and body, all of them already HTML."""

STYLE = """
:root {
  --paper: #fbfbfa; --sheet: #ffffff; --ink: #1d1d22; --soft: #6a6a73; --rule: #e5e5e2;
  --line-0: #2f6fde; --line-1: #d9662b; --line-2: #2a9d6e; --line-3: #8e5bd0;
  --phase-0: #2f6fde; --phase-1: #d9662b; --phase-2: #2a9d6e;
  --phase-3: #8e5bd0; --phase-4: #b8952e; --phase-5: #7b8794;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131417; --sheet: #1b1d21; --ink: #e9e9ec; --soft: #9b9ca6; --rule: #30333a;
    --line-0: #79a8ff; --line-1: #ff9d66; --line-2: #5ecf9f; --line-3: #bd96f5;
    --phase-0: #6b9bf5; --phase-1: #ef8d58; --phase-2: #50c191;
    --phase-3: #ab82e6; --phase-4: #d6b454; --phase-5: #8d98a6;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 1rem; padding-bottom: .4rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .8rem; }
header > p { color: var(--soft); margin: .3rem 0 1.4rem; }
small { color: var(--soft); font-size: .8rem; }
dl { display: flex; flex-wrap: wrap; gap: .7rem 2rem; margin: 0; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; font-weight: 550; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 1rem; }
.card, figure { background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1.1rem 1.3rem; }
.pair { display: flex; align-items: center; gap: 1.6rem; }
.pair > b { color: var(--soft); font-weight: 400; font-size: 1.4rem; }
.pair span, .pair small { display: block; }
.pair span { color: var(--soft); font-size: .8rem; }
.pair strong { font-size: 2rem; line-height: 1.25; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.change { margin: .9rem 0 0; padding-top: .7rem; border-top: 1px solid var(--rule);
  color: var(--soft); font-size: .9rem; }
.change strong { color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figcaption b, figcaption small { display: block; }
figcaption { margin-bottom: .6rem; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line, .raw { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; opacity: .3; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .5rem;
  color: var(--soft); font-size: .8rem; }
.legend i, th i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.bar { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden;
  margin-bottom: 1rem; background: var(--rule); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 500; }
tbody th { font-weight: 500; }
.alarms { margin: 0; padding: 1.1rem 1.3rem 1.1rem 2.4rem; background: var(--sheet);
  border: 1px solid var(--line-1); border-radius: 10px; }
.picture { margin-bottom: 1rem; }
.picture img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
details { margin-top: .7rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { overflow-x: auto; background: var(--sheet); border: 1px solid var(--rule);
  border-radius: 10px; padding: 1rem;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
ol { columns: 2 260px; font-size: .85rem; }
@media print { details { display: none; } main { padding: 0; } figure, .card { break-inside: avoid; } }
"""
