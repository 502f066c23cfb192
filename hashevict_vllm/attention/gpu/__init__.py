"""Mechanism on NVIDIA GPUs: Triton kernels around a stock backend of vLLM."""
