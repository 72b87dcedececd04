"""How well a cheap lookahead ranks what the exact one ranks: `python -m densegrpo_fast.fidelity`.

`options.py` is the command line, `variants.py` says which lookaheads are measured and `target.py` on what; `measure.py`
scores them on the same trajectories, and `training/agreement.py` compares the scores. `search.py` finds the cheapest
plan above given thresholds, `costs.py` tells what a plan costs, `report.py` and `plot.py` show it all.
"""
