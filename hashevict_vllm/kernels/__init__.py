"""Tensor kernels of the policies: a float32 oracle and one module per device."""
