"""Objective: from log-probabilities and advantages to one loss; one file per idea.

`policy.py` puts a training step's loss together; `registry.py` knows every policy loss and weighting of the steps by
its name, `pairs.py` holds what a policy loss is computed from.
"""
