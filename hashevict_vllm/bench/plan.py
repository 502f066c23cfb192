"""``plan``: what it costs to plan a step, once for all layers, on a CPU.

The metadata builder of an engine plans batches of decoding requests, alone and with one
chunk of a prompt among them; as a chunk that ends a segment there is a second attention
call. ``stock`` is vLLM's own builder for the same batch, which ours calls for every
attention call: the rest of the time is the plan's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.results import Results
from hashevict_vllm.bench.scenarios import BLOCK_SIZE, model_directory, own_pool
from hashevict_vllm.config import kv_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--policy", default="hashevict")
    add("--budget", type=int, default=1024)
    add("--segment", type=int, default=4096)
    add("--requests", nargs="+", type=int, default=[8, 64, 256], help="decoding")
    add("--chunk", type=int, default=512, help="tokens of the prompt's chunk")
    add("--model", default="random", help="default, random or a directory")
    add("--repeats", type=int, default=200)


def run(options: argparse.Namespace, results: Results) -> None:
    """Plan every batch in turn."""
    builder = make_builder(options)
    for requests in options.requests:
        parts: dict[str, timing.Part] = {}
        # Of a prompt: none, its first chunk, one across the end of its first segment.
        across = options.segment - options.chunk // 2
        starts = {"decode": None, "and a chunk": 0, "across segments": across}
        for name, start in starts.items():
            batch = make_batch(requests, start, options)
            plan, stock = planners(builder, batch)
            parts |= {name: plan, f"stock, {name}": stock}
        seconds = timing.interleaved(parts, options.repeats, warm_up=20)
        spreads = {
            name: timing.Spread.of(sample).as_dict() for name, sample in seconds.items()
        }
        results.add({"requests": requests, "seconds": spreads})
        shown = ", ".join(
            f"{name} {timing.show(s, 1e6)}" for name, s in spreads.items()
        )
        results.say(f"{requests} requests, us of a step: {shown}")


def make_builder(options: argparse.Namespace) -> Any:
    """The metadata builder of an engine's budgeted layers."""
    from vllm import LLM

    model = model_directory(options.model)
    policy = {"budget": options.budget, "segment": options.segment}
    llm = LLM(
        str(model),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        max_model_len=4 * options.segment,
        kv_cache_memory_bytes=own_pool(model, 8 * options.segment),
        additional_config=kv_policy(options.policy, **policy),
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    (groups,) = executor.driver_worker.worker.model_runner.attn_groups
    return groups[0].metadata_builders[0]


def make_batch(requests: int, start: int | None, options: argparse.Namespace) -> Any:
    """A batch of decoding requests, and of a chunk from ``start`` on, if any."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    # Half of them evict; one in four votes.
    lens = [options.budget // 2 + 9 * i % options.budget for i in range(requests)]
    prompts, counts = [64] * requests, [1] * requests
    if start is not None:
        lens.append(start + options.chunk)
        prompts.append(2 * options.segment)
        counts.append(options.chunk)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    blocks = -(-(options.budget + options.segment) // BLOCK_SIZE)
    tokens = sum(counts)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        num_reqs=len(lens),
        num_actual_tokens=tokens,
        max_query_len=max(counts),
        max_seq_len=max(lens),
        block_table_tensor=torch.zeros((len(lens), blocks), dtype=torch.int32),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        rswa_prefix_lens=torch.tensor(prompts, dtype=torch.int32),
    )


def planners(builder: Any, batch: Any) -> tuple[timing.Part, timing.Part]:
    """Our builder's plan of a batch, and the stock builder's."""
    stock: Any = next(
        t for t in type(builder).__mro__ if t.__module__.startswith("vllm.")
    )
    return lambda _: builder.build(0, batch), lambda _: stock.build(builder, 0, batch)
