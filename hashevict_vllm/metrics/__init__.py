"""Operation: what a budget does, as Prometheus metrics on vLLM's ``/metrics``."""
