"""Noise level per step from the balance of the gains' signs: `python -m densegrpo_fast.calibrate`.

`rules.py` decides from sign counts, `store.py` is the file that training takes, `report.py` shows it all; none of them
knows a model. `training/gain_meter.py` measures the gains.
"""
