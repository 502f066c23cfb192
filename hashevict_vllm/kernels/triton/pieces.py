"""The table that tells kernels what to do with each request.

A row is a `hashevict_vllm.plan.Piece`, in int32 columns; a row whose count is
zero asks for nothing, so a table may be longer than its batch (CUDA graphs).
"""

from __future__ import annotations

import triton.language as tl

NAMES = (
    "request",
    "start",
    "count",
    "row",
    "slot",
    "budget",
    "recent",
    "evict",
    "compact",
    "first_voter",
    "ballots",
    "live",
)
"""Row of the block table, then the fields of a `Piece`; ``live`` are the slots that the
piece's last token attends to."""

NUM_COLUMNS = tl.constexpr(len(NAMES))

REQUEST = tl.constexpr(NAMES.index("request"))
START = tl.constexpr(NAMES.index("start"))
COUNT = tl.constexpr(NAMES.index("count"))
ROW = tl.constexpr(NAMES.index("row"))
SLOT = tl.constexpr(NAMES.index("slot"))
BUDGET = tl.constexpr(NAMES.index("budget"))
RECENT = tl.constexpr(NAMES.index("recent"))
EVICT = tl.constexpr(NAMES.index("evict"))
COMPACT = tl.constexpr(NAMES.index("compact"))
FIRST_VOTER = tl.constexpr(NAMES.index("first_voter"))
BALLOTS = tl.constexpr(NAMES.index("ballots"))
LIVE = tl.constexpr(NAMES.index("live"))
