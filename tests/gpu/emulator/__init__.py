"""Compiled GPU code on a CPU: PTX, as Triton and nvcc write it, executed in NumPy with its memory accesses checked.

    ptx         text -> kernels: instructions, registers, parameters, shared memory
    values      types, rounding, and the approximate instructions with their documented error
    alu         what an arithmetic instruction computes
    memory      global and shared memory: bounds, alignment, uninitialised bytes, races
    machine     threads, divergence, barriers, shuffles
    tensors     tensors as regions of memory, and which bytes of fresh ones are written
    on_triton   Triton's launchers on CPU tensors
    on_cuda     csrc/*.cu on CPU tensors: nvcc's host code, with cudart.cpp for a runtime, and nvcc's PTX

docs/gpu.md says what this can and cannot find.
"""
