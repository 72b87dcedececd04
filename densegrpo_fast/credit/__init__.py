"""Credit: from rewards to one advantage per sample and step, [P, G, T].

`normalize.py` is the group-relative normalisation that every method shares; each other file is one method.
"""
