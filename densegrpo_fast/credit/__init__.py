"""Credit: from rewards to one advantage per sample and step, [P, G, T].

`normalize.py` is the group-relative normalisation that every method shares. `registry.py` knows every method by its
name, what it needs, and whether it is local to a step or needs the whole trajectory. `inputs.py` has what methods may
need. `smoothing.py` smooths rewards before credit, `closeness.py` adds to what a method gives, `consistency.py` is a
diagnostic; every other file is one method.
"""
