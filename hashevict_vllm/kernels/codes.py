"""Small integers that kernels on every device understand."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""How the raw bits of a K/V or query element are to be read."""

HAMMING_TO_KEY, HAMMING_TO_QUERY, RECENCY, NORM, RANDOM, KEY_DIFF, VOTE = range(7)
"""What the score of a slot is; see the rules in `hashevict_vllm.policies`."""
