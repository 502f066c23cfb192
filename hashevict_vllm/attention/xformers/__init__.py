"""xformers as a stock-like backend, for GPUs before Ampere."""
