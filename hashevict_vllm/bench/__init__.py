"""Measures speed and memory against stock vLLM in the same run.

One subcommand per module; `timing` interleaves what is compared and `results` writes
JSON and plots. Figures are ratios: absolute times say more about the machine.
"""
