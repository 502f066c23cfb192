"""How long a decode step's launches should take on an H100: arithmetic, not measured.

A launch takes `LAUNCH`, then `LOAD` for every load of memory that waits for another,
then the instructions of one warp at one in `CYCLES` cycles (a result is ready after so
many, and a program has few warps to fill the gap), once for every wave of programs.
Both counts are read from the machine code (`machine`). Stock attention and the MLP
are bytes over bandwidth. Whoever has a GPU compares with ``hashevict-vllm verify``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.aot import Launch, compile_launch
from hashevict_vllm.kernels.triton.machine import MachineCode
from hashevict_vllm.kernels.triton.shapes import Shape

BANDWIDTH = 3.35e12
"""Bytes per second of an H100 SXM's memory (NVIDIA's data sheet)."""

MULTIPROCESSORS, CLOCK = 132, 1750
"""Of an H100 SXM; cycles per microsecond."""

LAUNCH, LOAD = 1.0, 0.3
"""Microseconds between two launches of a graph, and of a load: some 500 cycles from
memory, half of that from the level 2 cache."""

CYCLES = 4
"""Cycles until the next instruction of a warp may use a result."""

FLOPS = 600e12
"""Per second, what large products in bfloat16 reach on it, of 989e12 (data sheet)."""

LAYERS = 32
LAYER_WEIGHTS = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
QUERY_WEIGHTS = 2 * (4096 * 4096 + 2 * 4096 * 1024)
HEAD_WEIGHTS = 2 * 4096 * 128256
"""Llama-3.1-8B in bfloat16: bytes of a layer's weights, of those among them that come
before attention, and of the last product's."""

_ARCHITECTURE = 90


@dataclass(frozen=True)
class Cost:
    """One launch.

    Attributes:
        instructions: Of a warp.
        loads: See `MachineCode.loads_in_turn`; more where a scan has several steps.
        waves: Rounds of programs, as many as fit at a time.
        microseconds: By the module's arithmetic.

    """

    instructions: int
    loads: int
    waves: int
    microseconds: float


def cost(launch: Launch, programs: int, trips: Sequence[int], more_loads: int) -> Cost:
    """The cost of a launch of so many programs.

    Args:
        launch: As recorded.
        programs: Of the grid.
        trips: How often each loop of the machine code runs.
        more_loads: Loads in turn beyond those of one round of every loop.

    """
    compiled = compile_launch(launch, _ARCHITECTURE)
    code = MachineCode.of(compiled.cubin)
    threads = compiled.threads
    fit = min(2048 // threads, 65536 // (max(compiled.registers, 1) * threads))
    waves = -(-programs // (MULTIPROCESSORS * fit))
    resident = min(fit, -(-programs // MULTIPROCESSORS))
    warps = resident * threads / 32 / 4  # of each of four schedulers
    instructions, loads = code.executed(trips), code.loads_in_turn + more_loads
    issue = instructions * max(CYCLES, warps) / CLOCK
    return Cost(instructions, loads, waves, LAUNCH + waves * (loads * LOAD + issue))


def write_cost(batch: int, budget: int, kind: int = codes.VOTE) -> Cost:
    """The launch that stands before attention, every request evicting a token."""
    shape = dataclasses.replace(Shape(), kind=kind, tokens=batch, budget=budget)
    (launch,) = (made for made in shape.launches() if made.name == "write")
    steps = -(-budget // launch.arguments["TILE"])
    # Of a further step a warp waits for the block table, then for the words.
    loop = [steps] if steps > 1 else []
    return cost(launch, batch * shape.heads, loop, 2 * (steps - 1))


def ballot_cost(batch: int, budget: int) -> Cost:
    """The launch beside attention and the MLP, every request casting a ballot."""
    shape = dataclasses.replace(Shape(), kind=codes.VOTE, tokens=batch, budget=budget)
    (launch,) = (made for made in shape.launches() if made.name == "ballot")
    tiles = -(-budget // launch.arguments["TILE"])
    dims, bits = shape.head_dim // launch.arguments["STEP"], [8, 0]  # by four, and rest
    guess = [tiles, *bits, *bits, 0, 2]  # two words, two axes
    trips = [1, tiles, 1, dims, dims, 1, dims, dims, *guess, tiles]
    # Block table and words, of the search and of both passes; scratch, read again.
    return cost(launch, batch * shape.heads, trips, 6 * tiles + 6)


def prompt_end(budget: int = 1024, segment: int = 4096) -> dict[str, Cost]:
    """What ends a lone segment of a prompt, launch by launch, for one layer."""
    shape = dataclasses.replace(
        Shape(), kind=codes.VOTE, tokens=segment, budget=budget, segment=segment
    )
    window, heads, bound = shape.rule.window, shape.heads, shape.bound
    made = {launch.name: launch for launch in shape.launches()}
    steps = -(-bound // made["select"].arguments["TILE"])
    tiles = -(-bound // made["tops"].arguments["TILE"])
    at_once = made["tops"].arguments["ROWS"] // shape.group
    voters, dims = -(-window // at_once), shape.head_dim // 16
    within, beyond = (
        -(-n // made["pair"].arguments["TILE"]) for n in (budget, segment)
    )
    moves = heads * -(-min(budget, segment) // made["move"].arguments["ROWS"])
    pooled = heads * -(-bound // made["pool"].arguments["TILE"])
    values = made["values"].arguments
    apart = -(-bound // values["TILE"])
    rounds = -(-apart // values["SLICES"])
    grids: dict[str, tuple[int, list[int], int]] = {
        "frame": (heads, [], 0),
        "ask": (heads * window, [dims, dims], 2),
        "tops": (heads * tiles, [voters], voters),
        "totals": (heads * window * shape.group, [1, 1], 0),
        "add": (heads * tiles, [voters], voters),
        "values": (heads * min(values["SLICES"], apart), [rounds], 2 * (rounds - 1)),
        "apart": (heads * apart, [], 0),
        "pool": (pooled, [1], 0),
        "select": (heads, [8, steps, steps], 2 * 9 * steps),
        "pair": (heads, [within, beyond], 2 * (within + beyond)),
        "move": (moves, [], 0),
    }
    return {name: cost(made[name], *grid) for name, grid in grids.items()}


@dataclass(frozen=True)
class Layer:
    """One layer of a decode step, in microseconds.

    Attributes:
        stock: Stock attention over C slots, and everything else, by bytes.
        before: Our launch before attention.
        beside: Our launch beside it and the MLP.
        percent: What a step takes longer than a stock one over as many slots, where
            nobody votes: at most seven of eight steps.
        voting: The same where somebody does, as far as there is nothing that ballots
            could run beside.
        mean: The same of a step where requests vote as it comes, each in one of eight.

    """

    stock: float
    before: Cost
    beside: Cost
    percent: float
    voting: float
    mean: float


@functools.cache
def decode_layer(batch: int, budget: int) -> Layer:
    """One layer of Llama-3.1-8B with votes."""
    shape = Shape()
    kept = batch * budget * shape.heads * shape.head_dim * 2 * shape.dtype.itemsize
    stock = (LAYER_WEIGHTS + kept) / BANDWIDTH * 1e6
    step = LAYERS * stock + HEAD_WEIGHTS / BANDWIDTH * 1e6
    before = write_cost(batch, budget)
    beside = ballot_cost(batch, budget)
    ours = LAYERS * before.microseconds
    # A ballot has time until the next layer writes, the last one until the model ends.
    late = beside.microseconds - stock
    too_late = late + QUERY_WEIGHTS / BANDWIDTH * 1e6
    most = ours + (LAYERS - 1) * max(late, 0.0) + max(too_late, 0.0)
    percent, voting = 100 * ours / step, 100 * most / step
    share = 1 - (1 - 1 / shape.rule.every) ** batch  # of steps in which somebody votes
    mean = percent + share * (voting - percent)
    return Layer(stock, before, beside, percent, voting, mean)


def table() -> list[str]:
    """Batches and budgets as a Markdown table."""
    lines = [
        "| batch | C | instructions | loads in turn | waves | µs before attention "
        "| µs beside it | µs of the stock layer | step | step with ballots |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for budget in (1024, 4096):
        for batch in (1, 8, 64):
            layer = decode_layer(batch, budget)
            c = layer.before
            lines.append(
                f"| {batch} | {budget:,} | {c.instructions:,} | {c.loads} | {c.waves} "
                f"| {c.microseconds:.1f} | {layer.beside.microseconds:.0f} "
                f"| {layer.stock:.0f} | +{layer.percent:.1f} % "
                f"| +{layer.voting:.1f} % |"
            )
    return lines


@dataclass(frozen=True)
class Expectation:
    """Where whoever times a GPU looks up what to expect.

    Attributes:
        layer: One layer of a decode step, of a batch and a budget.
        prompt_microseconds: See there.
        prompt_percent: See there.

    """

    layer: Callable[[int, int], Layer]
    prompt_microseconds: Callable[[], float]
    prompt_percent: Callable[[], float]


TIMES = {"pool": 3}
"""Launches of a kernel at the end of a segment, where it is more than one."""


@functools.cache
def prompt_microseconds() -> float:
    """Of one layer: what ends a lone segment of 4,096 tokens, C = 1024."""
    return sum(TIMES.get(name, 1) * c.microseconds for name, c in prompt_end().items())


def reading_microseconds(segment: int = 4096) -> float:
    """Of one layer: reading so many tokens, by products alone."""
    shape = Shape()
    weights = LAYER_WEIGHTS * segment  # bytes are twice the numbers, and so are FLOPs
    attention = 2 * segment**2 * shape.heads * shape.group * shape.head_dim
    return (weights + attention) / FLOPS * 1e6


def prompt_percent() -> float:
    """What the end of a lone segment of 4,096 tokens adds to reading it."""
    return 100 * prompt_microseconds() / reading_microseconds()


def prompt_table() -> list[str]:
    """What ends a segment as a Markdown table."""
    lines = [
        "| launch | instructions | loads in turn | waves | µs |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, c in prompt_end().items():
        times = TIMES.get(name, 1)
        label = f"`{name}`, three times" if times > 1 else f"`{name}`"
        lines.append(
            f"| {label} | {c.instructions:,} | {c.loads} | {c.waves} "
            f"| {times * c.microseconds:.1f} |"
        )
    together = f"| together | | | | {prompt_microseconds():.0f} |"
    reading = f"| reading the segment | | | | {reading_microseconds():,.0f} |"
    return [*lines, together, reading]


ON_H100 = Expectation(decode_layer, prompt_microseconds, prompt_percent)
