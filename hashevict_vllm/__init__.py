"""A fixed KV-cache budget for vLLM, with HashEvict eviction."""

__version__ = "0.1.0"
