"""``hashevict-vllm plan``: requests at once on a machine, with a budget and without.

No weights are read and no model runs. The pool is what ``--pool-gib`` says, or what is
left of ``--gpu-gib`` for it: times ``--gpu-memory-utilization``, less the weights and
``--overhead-gib`` for activations and CUDA graphs. vLLM measures the latter at start;
its log line "Available KV cache memory" is the number to give as ``--pool-gib`` then.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hashevict_vllm.cli import add_kv_policy_args, kv_policy_from_namespace
from hashevict_vllm.config import KVPolicyConfig, KVPolicyError
from hashevict_vllm.sizing.model import model_folder, read_config, weight_bytes
from hashevict_vllm.sizing.presets import PRESETS
from hashevict_vllm.values import fail

if TYPE_CHECKING:
    from hashevict_vllm.sizing.pool import Load

GIB, MIB = 2**30, 2**20
KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8")


def make_parser() -> argparse.ArgumentParser:
    """The command's options; those of the policy in all forms that vLLM's have."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="hashevict-vllm plan", description=__doc__)
    add = parser.add_argument
    add("model", help=f"folder, config.json, or one of {', '.join(PRESETS)}")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--gpu-gib", type=float, help="memory of one GPU")
    memory.add_argument("--pool-gib", type=float, help="memory of the KV cache")
    add("--gpu-memory-utilization", type=float, default=0.92)
    add("--overhead-gib", type=float, default=2.0, help="beside weights and KV cache")
    add("--weights-gib", type=float, help="if config.json does not tell (quantised)")
    add("--lengths", type=int, nargs="+", help="tokens of requests, prompt and output")
    add("--max-model-len", type=int)
    add("--block-size", type=int, default=16, help="16 on GPUs, 128 on CPUs")
    add(
        "--max-num-batched-tokens",
        type=int,
        help="what sliding-window layers hold depends on it (default: as on a server)",
    )
    add("--kv-cache-dtype", choices=KV_DTYPES, default="auto")
    add("--tensor-parallel-size", type=int, default=1)
    add("--json", action="store_true", help="print JSON instead of a table")
    add_kv_policy_args(parser).set_defaults(kv_policy="hashevict")
    return parser


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The plan as a dict of plain numbers, sizes in bytes.

    Raises:
        KVPolicyError: For options that make no plan.

    """
    policy = KVPolicyConfig.from_dict(kv_policy_from_namespace(options))
    if policy.budget is None:
        raise fail("--kv-budget", "is required, to be planned beside stock vLLM.")
    with model_folder(options.model) as folder:
        config = read_config(
            folder,
            max_model_len=options.max_model_len,
            block_size=options.block_size,
            tensor_parallel_size=options.tensor_parallel_size,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
        weights = 0
        if options.pool_gib is None:
            weights = weight_bytes(folder, config)
            if options.weights_gib is not None:
                weights = int(options.weights_gib * GIB)
    pool_bytes = _pool_bytes(options, weights)

    # Imported here: they import vLLM's engine, and options are refused before that.
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    from hashevict_vllm.sizing.pool import layer_specs, load_of, make_pool

    dtype = config.model_config.dtype
    if options.kv_cache_dtype != "auto":
        dtype = STR_DTYPE_TO_TORCH_DTYPE[options.kv_cache_dtype]
    pool = make_pool(config, layer_specs(config, policy, dtype), pool_bytes)
    longest = config.model_config.max_model_len
    for length in options.lengths or []:
        if not 1 <= length <= longest:
            raise fail("--lengths", f"{length} is not between 1 and {longest}.")
    loads = [load_of(config, pool, length) for length in options.lengths or [longest]]
    return {
        "model": options.model,
        "budget": policy.sizes(longest, options.block_size)["budget"],
        "max_model_len": longest,
        "pool_bytes": pool_bytes,
        "weight_bytes": weights,
        "blocks": pool.num_blocks - 1,
        "block_size": options.block_size,
        "lengths": [_row(load) for load in loads],
    }


def _pool_bytes(options: argparse.Namespace, weights: int) -> int:
    """Bytes of one GPU's KV cache."""
    if options.pool_gib is not None:
        return int(options.pool_gib * GIB)
    usable = options.gpu_gib * GIB * options.gpu_memory_utilization
    rest = usable - options.overhead_gib * GIB - weights / options.tensor_parallel_size
    if rest <= 0:
        raise fail(
            "--gpu-gib",
            f"nothing of {options.gpu_gib:g} GiB is left for a KV cache beside "
            f"{weights / GIB:.1f} GiB of weights on {options.tensor_parallel_size} "
            "GPUs; use more, or a larger --tensor-parallel-size.",
        )
    return int(rest)


def _row(load: Load) -> dict[str, Any]:
    found = load.found
    return {
        "tokens": load.length,
        "bytes_per_request": load.request_bytes,
        "bytes_while_reading": load.reading_bytes,
        "requests": found.requests,
        "requests_while_reading": found.requests_reading,
        "stock_bytes_per_request": load.stock_request_bytes,
        "stock_requests": found.stock_requests,
        "against_stock": found.requests / found.stock_requests
        if found.stock_requests > 0
        else None,
    }


COLUMNS = (
    ("tokens", "tokens", "{:,.0f}", 1),
    ("MiB/request", "bytes_per_request", "{:,.1f}", MIB),
    ("at once", "requests", "{:,.1f}", 1),
    ("while reading", "requests_while_reading", "{:,.1f}", 1),
    ("stock MiB", "stock_bytes_per_request", "{:,.1f}", MIB),
    ("stock at once", "stock_requests", "{:,.2f}", 1),
    ("factor", "against_stock", "{:,.1f}", 1),
)
"""Heading, key, format and unit of the table's columns."""


def table(found: dict[str, Any]) -> str:
    """A plan as text."""
    lines = [
        f"{found['model']}: a budget of {found['budget']:,} tokens per KV head, "
        f"{found['pool_bytes'] / GIB:.2f} GiB of KV cache per GPU "
        f"({found['blocks']:,} blocks of {found['block_size']} tokens)"
    ]
    cells = [[heading for heading, *_ in COLUMNS]]
    for row in found["lengths"]:
        values = [(row[key], form, unit) for _, key, form, unit in COLUMNS]
        cells.append(["-" if v is None else f.format(v / u) for v, f, u in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    # vLLM logs to stdout, where the plan goes, and about this machine.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = make_parser()
    options = parser.parse_args(arguments)
    logger = logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        found = plan(options)
    except KVPolicyError as error:
        parser.exit(2, f"hashevict-vllm plan: error: {error}\n")
    finally:
        logger.setLevel(level)
    print(json.dumps(found, indent=2) if options.json else table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
