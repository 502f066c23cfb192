"""Baselines that need attention scores, and oracles of our own rule, offline.

``scripts/evaluate-offline`` (``python -m hashevict_vllm.eval.offline``) runs rules that
a served engine cannot (its attention kernels keep no weights) on the same samples, with
the same scores, and files them as records of the same form: in the same output folder
they stand beside the engine's rows.

- `model`: transformers with our attention; the exact prefill that all rules share;
- `rules`: what is kept of a prompt and evicted in decode; where kvpress 0.5.5 has the
  method, the prompt is judged by its code (`rules.press`);
- `slots`: the live slots of one layer;
- `generate`: decoding of forced and of free answers;
- `runner`, `__main__`: samples × rules × budgets.

A prompt is always read exactly and reduced once, at its end, and a step of decode
evicts before it attends: no query sees more than the budget's slots. With our own rule
that is the served default for prompts of up to ``segment`` tokens.
"""
