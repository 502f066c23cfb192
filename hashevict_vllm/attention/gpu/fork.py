"""Work that runs beside attention and the MLP, on a stream of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class Fork:
    """At most one piece of work at a time, between `start` and `join`.

    On a GPU it begins when everything that was launched before `start` is done, and is
    done before anything that is launched after `join`; in between it runs beside the
    rest. Within a CUDA graph that is a branch of it, which must be joined before the
    capture ends. Without a GPU, in Triton's interpreter, it runs when it is joined, as
    late as it ever may: whoever changed what it reads in between would be found out.

    Attributes:
        ends_with_model: Whether `join_after` has been seen to join it, so that the last
            layer need not: its work may run beside the MLP, too.

    """

    ends_with_model = False

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._late: Callable[[], None] | None = None
        self._runs = False
        _FORKS.add(self)

    def start(self, work: Callable[[], None]) -> None:
        """Launch work that may touch nothing that is touched before `join`.

        Args:
            work: Launches kernels, and allocates no memory.

        """
        self.join()
        if self._stream is None:
            self._late = work
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._runs = True

    def join(self) -> None:
        """Let what comes next wait for the work; the host does not."""
        late, self._late = self._late, None
        if late is not None:
            late()
        if self._runs and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._runs = False


_FORKS: weakref.WeakSet[Fork] = weakref.WeakSet()
"""All of the process, in which one worker runs one model."""


def join_after(model: torch.nn.Module) -> None:
    """Join forks when the model's forward ends, within the CUDA graph that captures it.

    Before a graph is captured, both model runners run the model once without
    (`Fork.ends_with_model`); a model whose class bypasses hooks is left to its last
    layer.

    Args:
        model: As the model runner calls it, before CUDA graphs wrap it.

    """

    def join(*_: Any) -> None:
        for fork in _FORKS:
            fork.join()
            fork.ends_with_model = True

    model.register_forward_hook(join)
