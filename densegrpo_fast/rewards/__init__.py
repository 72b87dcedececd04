"""Rewards: how well a picture does what its prompt asks for.

`base.py` holds the contract and the weighted mixture, `registry.py` knows every reward by its name and checks the
options that a configuration gives to it. A reward's own file is imported only when a run names it.
"""
