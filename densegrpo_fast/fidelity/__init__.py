"""How well a cheap lookahead ranks what the exact one ranks: `python -m densegrpo_fast.fidelity`.

`choice.py` says what a run measures, the configuration's own lookahead first, and `target.py` on what; `measure.py`
scores plans against the exact one on the same trajectories, `statistics.py` holds the rank statistics, `search.py`
finds the cheapest plan above given thresholds, with paths of each state's own from `paths.py`, `costs.py` tells what a
plan costs, `report.py` and `plot.py` show it all.
"""
