"""Do two programs of a launch touch one byte, and does forked work touch another's?

The interpreter runs programs one after the other, so that a race would not show in
results. Here every load and store of every program is noted, by address. (triton-viz
3.0 traces accesses, and finds those out of bounds; it looks for no races.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from hashevict_vllm.attention.gpu.fork import Fork


class Accesses:
    """Bytes read and written, by an integer that says who did."""

    def __init__(self) -> None:
        self._read: list[tuple[int, np.ndarray]] = []
        self._written: list[tuple[int, np.ndarray]] = []

    def note(self, who: int, pointers: Any, mask: Any, writes: bool) -> None:
        """Note what a load or a store of the interpreter touches."""
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        first = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data]
        touched = (
            first.astype(np.uint64)[:, None] + np.arange(size, dtype=np.uint64)
        ).ravel()
        (self._written if writes else self._read).append((who, touched))

    def add(self, other: Accesses, who: int) -> None:
        """All that another has noted, as done by one."""
        self._read += [(who, touched) for _, touched in other._read]
        self._written += [(who, touched) for _, touched in other._written]

    @staticmethod
    def _pairs(noted: list[tuple[int, np.ndarray]]) -> np.ndarray:
        """Distinct (byte, who) as [n, 2]."""
        if not noted:
            return np.empty((0, 2), np.uint64)
        bytes_ = np.concatenate([touched for _, touched in noted])
        whose = np.concatenate([np.full(len(t), w, np.uint64) for w, t in noted])
        return np.unique(np.stack([bytes_, whose], axis=1), axis=0)

    def conflicts(self) -> int:
        """Bytes that one writes and another reads or writes."""
        written = self._pairs(self._written)
        touched = self._pairs(self._written + self._read)
        at, number = np.unique(touched[:, 0], return_counts=True)
        shared = at[number > 1]
        return int(np.isin(shared, written[:, 0]).sum())


class Races:
    """What was found.

    Attributes:
        launches: Names of the kernels that were looked at.
        found: A sentence for each launch, or fork, with a race.

    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.found: list[str] = []
        self.forks = 0
        self._now: Accesses | None = None
        self._beside: Accesses | None = None
        self._forked: Accesses | None = None

    def launch(self, run: Callable[[], Any], name: str) -> Any:
        """Run one launch, and look at it."""
        outer, self._now = self._now, Accesses()
        try:
            result = run()
            count = self._now.conflicts()
            if count:
                self.found.append(f"{name}: programs race for {count} bytes")
            self.launches.append(name)
            region = self._forked if self._forked is not None else self._beside
            if region is not None:
                region.add(self._now, 0)
        finally:
            self._now = outer
        return result

    def note(self, builder: Any, pointers: Any, mask: Any, writes: bool) -> None:
        """One load or store of the program that runs."""
        if self._now is not None:
            x, y, z = builder.grid_idx
            _, ny, nz = builder.grid_dim
            self._now.note((x * ny + y) * nz + z, pointers, mask, writes)

    def start(self) -> None:
        """Work is forked: what is launched from now on runs beside it."""
        self._beside = Accesses()

    def join(self, late: Callable[[], None]) -> None:
        """The forked work, which is joined; looked at against all beside it."""
        self._forked = Accesses()
        late()
        both = Accesses()
        assert self._beside is not None
        both.add(self._beside, 0)
        both.add(self._forked, 1)
        self.forks += 1
        count = both.conflicts()
        if count:
            self.found.append(f"forked work races for {count} bytes")
        self._forked = self._beside = None


@contextmanager
def watched() -> Iterator[Races]:
    """Within this context every interpreted launch is looked at."""
    races = Races()
    call = GridExecutor.__call__
    load, store = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    start, join = Fork.start, Fork.join

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return races.launch(lambda: call(self, *args, **kwargs), self.fn.__name__)

    def note_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        races.note(self, pointers, mask, writes=False)
        return load(self, pointers, mask, *rest)

    def note_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        races.note(self, pointers, mask, writes=True)
        return store(self, pointers, value, mask, *rest)

    def begin(self: Fork, work: Callable[[], None]) -> None:
        start(self, lambda: races.join(work))
        races.start()

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", note_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", note_store),
        mock.patch.object(Fork, "start", begin),
        mock.patch.object(Fork, "join", join),
    ):
        yield races


def fork_of(device: str = "cpu") -> Fork:
    """A fork as the interpreter has it."""
    return Fork(torch.device(device))
