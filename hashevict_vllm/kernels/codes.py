"""Numbers that kernels on every device and the oracle share."""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""How the raw bits of a K/V or query element are to be read."""

HAMMING_TO_KEY, HAMMING_TO_QUERY, RECENCY, NORM, RANDOM, KEY_DIFF, VOTE = range(7)
"""What the score of a slot is; see the rules in `hashevict_vllm.policies`."""

SMOOTH = 2
"""Votes are averaged over this many positions to either side before they are pooled."""

AHEAD = 1
"""Of the pooled positions, how many lie before the attended slot; the rest follow it:
a query finds the words that it knows, and the answer stands behind them."""

NEIGHBOURS = 0.5
"""Share of its merit that a slot has in votes at least after a selection.

What was kept for its neighbours would else be the first to go in decode; with all of
them (1) decode would judge neighbourhoods, and keep words for what stood beside them.
A power of two, so that no product is rounded.
"""

RECENT_IN_SELECTION = 32
"""Of the ``recent`` tokens a selection protects at most so many, the last ones.

All voters have judged what lies before them, so that what is protected for its age
takes the place of what was asked for; a prompt's last tokens, which few or none have
judged, are among those 32. In decode a token has only its age until it has votes.
"""

BESIDE = 1
"""How far the value of a slot is from the mean is averaged over this many positions to
either side (`hashevict_vllm.policies.value`)."""

PROMPT_ENDS, PROMPT_GOES_ON = 1, 2
"""Where a live set is reduced; 0 is that it is not."""

OCTAVES = 31
"""Lowest bits of a slot's votes, which are no votes but how large its value is
(`hashevict_vllm.policies.value.octaves`); who counts votes leaves them out."""

LOWEST_OCTAVE = -16
"""Squared norms of values below 2 to this count as that much."""

BEFORE_THE_END = 8
"""Times as much credit for unusual values where the prompt goes on, as nobody knows yet
what it will ask (`hashevict_vllm.policies.value`)."""

UNDESCRIBED = -1
"""Instead of `Described.words`, which end in an exponent below 255: not yet described.

A ballot describes such slots before it reads them, and nobody else reads descriptions.
"""

LONGEST = 3.4028234663852886e38
"""The largest float32: keys with a coordinate beyond it, or with one that is not a
number, are kept as 0."""

PARALLEL = 1e-12
"""Squared sine below which two directions count as one."""

NO_DIRECTION = 2**31 - 1
"""The score of a key whose squared norm is not finite in float32: it goes first."""

SHORTEST = 1e-12
"""Keys are divided by their norm, or by this if that is larger; 0 stays 0."""

NOT_A_NUMBER = 0x7FC00000
"""The score of a key whose norm is NaN, whatever bits that has; above infinity's."""
