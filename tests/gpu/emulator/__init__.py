"""Compiled GPU code on a CPU: PTX, as Triton and nvcc write it, executed in NumPy with its memory accesses checked.

    ptx         text -> kernels: instructions, registers, parameters, shared memory
    values      types, rounding, and the approximate instructions with their documented error
    alu         what an arithmetic instruction computes
    memory      global and shared memory: bounds, alignment, uninitialised bytes, races
    machine     threads, divergence, barriers, shuffles
    on_triton   Triton's launchers on CPU tensors

docs/gpu.md says what this can and cannot find.
"""
