"""Tensor kernels of the policies, one module per device. They know no vLLM."""
