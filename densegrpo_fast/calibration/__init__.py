"""Noise level per step from the balance of the gains' signs: `python -m densegrpo_fast.calibrate`.

`rules.py` decides from sign counts, and knows no model; `measure.py` draws trajectories and their gains; `store.py` is
the file that training takes; `report.py` shows it all.
"""
