"""How kernels are launched: tile sizes, padded sizes, checks of what they assume."""

from __future__ import annotations

import torch
import triton

_BITS_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

SCAN_TILE = 1024
"""Slots per step of a scan: four independent loads per word and thread of 8 warps."""

WRITE_TILE = 4096
"""What the scan that attention waits for takes in one step, if that is all: a loop
would wait for its block table and words again, and needs more registers per slot."""

SCAN_OPTIONS = {"num_warps": 8, "maxnreg": 128}
"""A program has 256 threads. Without a bound ptxas spills a register here and there to
fit one more program on a multiprocessor; with it none of the kernels does."""

FRAME_OPTIONS = {"num_warps": 4, "maxnreg": 128}
"""Bounded as scans are: it needs half of that."""

DESCRIBE_OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
"""With three stages tiles of float64 would take more than 48 KiB of shared memory;
bounded as scans are."""

DESCRIBE_TOKENS = 32
"""Slots described by one program: one variant for every length."""

BALLOT_OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 128}
"""As `SCAN_OPTIONS`. It describes, projects and scans; with two stages it spills."""

COPY_OPTIONS = {"num_warps": 1}
"""A program copies one row of K and of V."""

VOTE_ELEMENTS = 2048
"""Query heads times slots per step of a vote, so that logits stay in registers."""

BALLOT_PROGRAMS = 264
"""Ballots held at once: two on each multiprocessor of an H100."""

BALLOT_BYTES = 64 << 20
"""Of logits of ballots held at once: 264 of them for 4 queries and 15,000 slots."""

SEGMENT_TILE = 128
"""Slots of a program where the last queries of a segment vote."""

SEGMENT_ROWS = 16
"""Queries of a matrix product there: voters times query heads."""

SEGMENT_OPTIONS = {"num_warps": 8, "maxnreg": 128}
"""As `SCAN_OPTIONS`."""

TOTALS_TILE = 64
"""Tiles of slots per step, when what was found in them is put together."""

POOL_TILE = 256
"""Slots of a program where votes of neighbours are looked up."""

VALUE_ELEMENTS = 8192
"""Numbers of the values that a program reads at a time."""

VALUE_SLICES = 32
"""Sums of values that as many programs calculate, and every later program adds up."""

VALUE_OPTIONS = {"num_warps": 8, "maxnreg": 128}
"""As `SCAN_OPTIONS`."""

MOVE_ELEMENTS = 4096
SIGN_STEP = 16
PLAN_TILE = 1024


def padded(n: int) -> int:
    """The power of two from n on: sizes of Triton's tensors."""
    return triton.next_power_of_2(max(n, 1))


def scan_tile(bound: int) -> int:
    """Slots per step for requests of at most ``bound`` slots."""
    return min(SCAN_TILE, max(padded(bound), 32))


def write_tile(budget: int) -> int:
    """Slots per step of the scan that attention waits for, which is over a budget."""
    return 2 * SCAN_TILE if budget > WRITE_TILE else max(padded(budget), 32)


def scan_options(budget: int) -> dict[str, int]:
    """As `SCAN_OPTIONS`, with twice as many threads for more slots."""
    if budget > SCAN_TILE:
        return {"num_warps": 16, "maxnreg": 64}
    return SCAN_OPTIONS


def vote_tile(group: int, bound: int) -> int:
    """Slots per step where every slot is met by a group of queries.

    Half as many for more than eight queries: on sm_80 a register would be spilled.
    """
    elements = VOTE_ELEMENTS if group <= 8 else VOTE_ELEMENTS // 2
    return min(scan_tile(bound), max(elements // padded(group), 32))


def value_tile(head_dim: int) -> int:
    """Slots whose values a program reads at a time."""
    return max(VALUE_ELEMENTS // padded(head_dim), 1)


def move_rows(head_dim: int) -> int:
    """Slots moved by one program."""
    return max(MOVE_ELEMENTS // padded(head_dim), 1)


def sign_tokens(num_tokens: int, group: int) -> int:
    """Tokens signed by one program: one where programs are few, as in decode."""
    one, most = sign_variants(group)
    return most if num_tokens >= 16 * most else one


def sign_variants(group: int) -> tuple[int, int]:
    """What `sign_tokens` chooses from."""
    return 1, max(64 // padded(group + 1), 1)


def columns(bits: int) -> int:
    """Columns of a product with the projection: whole words."""
    return max(padded(bits), 32)


def as_integers(cache: torch.Tensor) -> torch.Tensor:
    """The raw bits of a cache: moving slots is the same for every dtype."""
    return cache.view(_BITS_OF_SIZE[cache.element_size()])


def check_rows(**tensors: torch.Tensor) -> None:
    """Refuse tensors whose last dimension is strided.

    Raises:
        ValueError: Naming the tensor.

    """
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: its last dimension must be contiguous.")
