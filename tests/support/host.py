"""Tensors that stand for a GPU's: asking the host for their values is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import GridExecutor

_ASKS = (
    "item", "tolist", "cpu", "numpy", "to", "__bool__", "__int__", "__float__",
    "__index__", "__array__", "nonzero", "equal", "is_nonzero",
)  # fmt: skip


class DeviceTensor(torch.Tensor):
    """A CPU tensor that refuses whatever would wait for a GPU to finish."""

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        assert name not in _ASKS, f"the host asked for a value with .{name}()"
        return super().__torch_function__(function, types, args, kwargs or {})


def _plain(argument: Any) -> Any:
    """An argument, or every field of a group of them, without this class."""
    if isinstance(argument, torch.Tensor):
        return argument.as_subclass(torch.Tensor)
    if isinstance(argument, tuple):
        return argument._make(map(_plain, argument))  # type: ignore[attr-defined]
    return argument


@contextmanager
def forbidden_on_host() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yields what turns a tensor into one that refuses; kernels may read it.

    A launch hands plain tensors to the interpreter, which plays the device.
    """
    launch = GridExecutor.__call__

    def on_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *map(_plain, args), **kwargs)

    with mock.patch.object(GridExecutor, "__call__", on_device):
        yield lambda x: x.as_subclass(DeviceTensor)
