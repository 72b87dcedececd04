"""Credit: from rewards to one advantage per sample and step, [P, G, T].

`normalize.py` is the group-relative normalisation that every method shares; `registry.py` knows every method by its
name and what it needs, `evidence.py` holds what there is; each other file is one method, but for `consistency.py`,
which only looks.
"""
