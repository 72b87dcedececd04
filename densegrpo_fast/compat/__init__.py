"""Other codebases' names, signatures and numerics on this package's ops; one module or package per host.

Nothing of a host, nor diffusers, is imported here: hosts are found where the user's own program imports them.
"""
