"""Mechanism on CPUs: numba's kernels around vLLM's CPU attention."""
