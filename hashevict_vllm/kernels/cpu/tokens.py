"""The q, k and v of a step, read where they lie (numba).

They are slices of one projection's output in most models: copies of them would cost
more than the kernel's dispatch, and so do numpy views, so that addresses are passed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.slots import load


class Tokens(NamedTuple):
    """Raw elements: e of a row and head at row * stride + head * D + e.

    Attributes:
        q: From the first query on.
        k: From the first key on.
        v: From the first value on.
        q_stride: Elements between rows of q.
        k_stride: The same for k.
        v_stride: The same for v.
        group: G, query heads per KV head.

    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_stride: int
    k_stride: int
    v_stride: int
    group: int


def with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` [T, H, D], copied only if the elements of a row do not lie together."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def addresses(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[int, int, int, int, int, int, int, int]:
    """What kernels take of q [T, Hq, D], k and v [T, Hkv, D], all `with_whole_rows`.

    Returns:
        Address and row stride of each, then T and G. They hold no reference: the
        tensors must live until the kernel returns.

    """
    return (
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        query.shape[0],
        query.shape[1] // key.shape[1],
    )


@intrinsic
def _array_at(typingctx: Any, address: Any, length: Any, like: Any) -> Any:
    """The 1-D array of ``length`` elements at an address, typed as ``like`` is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(like)(context, builder)
        element = context.get_data_type(like.dtype)
        size = context.get_constant(signature.args[1], element.width // 8)
        populate_array(
            array,
            data=builder.inttoptr(args[0], element.as_pointer()),
            shape=[args[1]],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return like(address, length, like), codegen


@njit
def tokens_at(places, elements):
    """`Tokens` of ``places``, which are `addresses`; elements are typed as those."""
    count = places[6]
    return Tokens(
        _array_at(places[0], count * places[1], elements),
        _array_at(places[2], count * places[3], elements),
        _array_at(places[4], count * places[5], elements),
        places[1],
        places[3],
        places[5],
        places[7],
    )


@inlined
def load_new_key(pages, tokens, row, head, x):
    """A token's key as float32, into ``x`` [D]."""
    at = row * tokens.k_stride + head * pages.dim
    load(tokens.k[at : at + pages.dim], pages.kind, x)


@inlined
def load_new_value(pages, tokens, row, head, x):
    """A token's value as float32, into ``x`` [D]."""
    at = row * tokens.v_stride + head * pages.dim
    load(tokens.v[at : at + pages.dim], pages.kind, x)


@inlined
def load_queries(pages, tokens, row, head, x):
    """The G query rows of a KV head as float32, into ``x`` [G * D]."""
    size = tokens.group * pages.dim
    at = row * tokens.q_stride + head * size
    load(tokens.q[at : at + size], pages.kind, x)
