"""Rewards: how well a picture does what its prompt asks for.

`base.py` holds the contract and the weighted mixture, `registry.py` knows every reward by its name, `options.py` checks
the options that a configuration gives to one. Every other reward is a file, imported only when a run names it.
"""
