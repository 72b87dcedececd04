"""Main module of a process that a launched script has spawned, in the script's place; see `launch_script`."""

from densegrpo_fast.launch_script import resume

resume(globals())
