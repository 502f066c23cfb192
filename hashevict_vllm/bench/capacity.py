"""``capacity``: what a pool holds, asked of vLLM's own accounting.

No model runs. Requests are counted as vLLM's scheduler would admit them: blocks of a
request of the given length, out of the pool's; for ours once prompts are read and while
they are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from hashevict_vllm.bench.layer import Shape
from hashevict_vllm.bench.results import Results
from hashevict_vllm.bench.rules import RULES, rule_named
from hashevict_vllm.config import KVPolicyConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--rules", nargs="+", default=["vote", "instant"], choices=list(RULES))
    add("--lengths", nargs="+", type=int, default=[8192, 32768, 131072])
    add("--shares", nargs="+", default=["50%", "25%", "12.5%"])
    add("--pool-gib", type=float, default=16.0)
    add("--layers", type=int, default=32)
    add("--head-dim", type=int, default=128)
    add("--heads", default="32/8", metavar="QUERY/KV")


def run(options: argparse.Namespace, results: Results) -> None:
    """Compute the table."""
    query_heads, kv_heads = map(int, options.heads.split("/"))
    shape = Shape(query_heads, kv_heads, options.head_dim)
    pool = int(options.pool_gib * 2**30)
    dtypes = {"": shape.dtype, " fp8": torch.float8_e4m3fn}
    for length in options.lengths:
        rows = [
            {
                "cache": f"stock{name}",
                **stock_row(shape, options.layers, pool, length, dtype),
            }
            for name, dtype in dtypes.items()
        ]
        stock = rows[0]
        for rule, share, name in product(options.rules, options.shares, dtypes):
            quantised = replace(shape, dtype=dtypes[name])
            found = budget_row(rule, share, quantised, options.layers, pool, length)
            rows.append({"cache": f"{rule}{name} {share}", **found})
        for row in rows:
            row["against_stock"] = row["requests"] / stock["requests"]
            results.add(row)
            results.say(
                f"{length} tokens, {row['cache']}: "
                f"{row['bytes_per_request'] / 2**20:.1f} MiB per request, "
                f"{row['requests']:.1f} requests at once "
                f"({row['against_stock']:.2f} x stock), "
                + (
                    f"{row['requests_while_reading']:.1f} while prompts are read, "
                    if "requests_while_reading" in row
                    else ""
                )
                + f"longest context {row['longest_context'] or 'any'}"
            )


def stock_row(
    shape: Shape, layers: int, pool: int, length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Stock vLLM's full attention.

    Returns:
        Bytes of a request of ``length`` tokens, such requests that the pool holds
        (fractional), the longest single request.

    """
    from vllm.utils.math_utils import cdiv
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_dim,
        dtype=dtype,
    )
    block = spec.page_size_bytes * layers
    blocks = pool // block - 1  # block 0 is vLLM's null block
    needed = cdiv(length, spec.block_size)
    return {
        "length": length,
        "bytes_per_request": needed * block,
        "requests": blocks / needed,
        "longest_context": blocks * spec.block_size,
    }


def budget_row(
    rule: str, share: str, shape: Shape, layers: int, pool: int, length: int
) -> dict[str, Any]:
    """A budget of a share of the length; as `stock_row`, any context being served.

    ``requests_while_reading``: all of them with a whole open segment.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec

    wanted = KVPolicyConfig.from_dict(rule_named(rule) | {"budget": share})
    policy = wanted.resolve(length, shape.block_size)
    spec = BudgetedAttentionSpec.from_stock(
        FullAttentionSpec(
            block_size=shape.block_size,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=shape.dtype,
        ),
        policy,
    )
    block = spec.page_size_bytes * layers
    blocks = pool // block - 1
    return {
        "length": length,
        "budget": policy.budget,
        "bytes_per_request": spec.bounds.steady_blocks * block,
        "metadata_share": spec.tail_bytes / spec.unpadded_page_size_bytes,
        "requests": blocks / spec.bounds.steady_blocks,
        "requests_while_reading": blocks / spec.bounds.prefill_blocks(length),
        "longest_context": None,
    }
