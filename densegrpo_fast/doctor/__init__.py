"""The doctor: what this machine offers a run, and why an unchanged policy's importance ratio is not 1.

`environment.py` gathers findings about packages, implementations and machine; `loop.py` is one rollout and its replay,
`ablations.py` switches single differences between the two off, `causes.py` names them, `diagnosis.py` finds the guilty.
"""
