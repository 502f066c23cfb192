"""``hashevict-vllm plan``: what a budget buys on a machine, before one is rented."""
