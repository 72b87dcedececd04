"""Main module of a process that a launched script has spawned, in the script's place; see `run_script`."""

from densegrpo_fast.compat.run_script import resume

resume(globals())
