"""Rewards: how well a picture does what its prompt asks for.

`base.py` holds the contract, the weighted mixture and the registry; every other file is one reward, imported
only when a run names it.
"""
