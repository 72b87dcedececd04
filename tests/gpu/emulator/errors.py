"""What the machine finds wrong with a kernel, one class for each kind."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel did what a GPU would not survive, or would not do the same way twice."""


class OutOfBounds(Fault):
    """An access outside of the tensors of a launch, or of the shared memory of a block."""


class Misaligned(Fault):
    """An address that is no multiple of the bytes moved."""


class Uninitialised(Fault):
    """A value that nobody has written: of a register, of shared memory, of a fresh tensor."""


class Race(Fault):
    """Two threads at one byte without a barrier between them, one of them writing."""


class Divergence(Fault):
    """A barrier or a shuffle that some of its threads never reach."""


class BadLaunch(Fault):
    """Grid, block or parameters that the kernel was not compiled for."""


class Unsupported(Fault):
    """An instruction that the machine does not know."""
