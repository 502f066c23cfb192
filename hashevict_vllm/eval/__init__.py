"""Evaluation: what a KV-cache budget costs, measured through the served engine.

``scripts/evaluate`` (``python -m hashevict_vllm.eval``) runs a grid of policies,
budgets and tasks, one engine per policy and budget, and writes one JSON line per
sample, a Markdown report and plots.

- `tasks`: what is asked, one family per file;
- `forcing`: how a given answer is scored in decode, so that eviction acts on it;
- `grid`, `engine`, `runner`, `records`: what is run, on what, and what is kept;
- `aggregate`: how samples become one figure, fixed before anything was run;
- `report`: tables and plots.

Needs the ``eval`` extra. Data come from packages at run time (`data`).
"""
