"""``hashevict-vllm verify --bench``: what a budget costs on this GPU, against stock.

Launches alone and inside a CUDA graph; then vLLM's engine with a Llama-3.1-8B of random
weights, stock and with two budgets: decode steps, the end of a prompt, mixed steps.
Every figure stands beside what `hashevict_vllm.kernels.triton.cost` expects of an H100
and beside what is promised.
"""
