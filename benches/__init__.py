"""Measurements of the package: operations (`ops`), whole iterations, learning, an independent judge, GPUs, pages."""
