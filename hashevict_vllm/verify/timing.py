"""How long the kernels of a decode step take on this GPU, against their byte floor.

A layer of Llama-3-8B with 8 requests, each with a full budget. Kernels are replayed
from a CUDA graph, as in a server, so that launches by the host do not count. The floor
is `hashevict_vllm.kernels.triton.report.floor_bytes` over the bandwidth that copying
reaches on this GPU in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from statistics import median

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.report import floor_bytes
from hashevict_vllm.kernels.triton.shapes import Shape
from hashevict_vllm.verify.checks import PASSED, Check
from hashevict_vllm.verify.workload import decode_launches

REPEATS = 20
"""Launches that are timed together."""

COPIED_BYTES = 1 << 30


def microseconds(launch: Callable[[], object], in_graph: bool = True) -> float:
    """Median time of one launch, `REPEATS` of which follow each other.

    Args:
        launch: Launches kernels.
        in_graph: Within a CUDA graph, as in decode; else by the host, one by one.

    """
    launch()  # compiles
    torch.cuda.synchronize()

    def repeat() -> None:
        for _ in range(REPEATS):
            launch()

    replay = repeat
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat()
        replay = graph.replay
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / REPEATS)
    return median(times)


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (microseconds(lambda: target.copy_(source)) * 1e-6)


def run() -> Iterator[Check]:
    """Time both rules of HashEvict; nothing to pass or fail."""
    reached = bandwidth()
    yield Check("time", "copy", PASSED, f"{reached / 1e12:.2f} TB/s")
    for kind, label in ((codes.HAMMING_TO_QUERY, "instant"), (codes.VOTE, "vote")):
        shape = dataclasses.replace(Shape(), kind=kind)
        floors = floor_bytes(shape)
        for name, launch in decode_launches(shape)[0].items():
            taken, floor = microseconds(launch), floors[name] / reached * 1e6
            detail = f"{taken:.1f} µs, floor {floor:.2f} µs ({floors[name]:,} bytes)"
            yield Check("time", f"{name} ({label})", PASSED, detail)
