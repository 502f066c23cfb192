"""One batch through one engine, in a process of its own; prints seconds as JSON.

Run by `hashevict_vllm.bench.peer` as a file, by interpreters that need not have this
package: nothing of it is imported here unless the engine is ours.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

Generate = Callable[[list[list[int]], int], None]
"""Greedy answers of so many tokens to prompts of equal length."""


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, the same in every process."""
    numbers = random.Random(0)
    return [
        [numbers.randrange(100, vocabulary - 100) for _ in range(length)]
        for _ in range(count)
    ]


def kvpress_engine(options: argparse.Namespace) -> tuple[Generate, dict[str, str]]:
    """Kvpress on transformers: its cheapest press, in the prompt and in the answer.

    The cache is cut to the budget at the prompt's end and whenever ``--interval`` more
    tokens have come; positions go on, as in kvpress's own pipeline.
    """
    import kvpress
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )

    @torch.inference_mode()
    def generate(batch: list[list[int]], count: int) -> None:
        ids = torch.tensor(batch)
        length = ids.shape[1]
        press = kvpress.PrefillDecodingPress(
            prefilling_press=kvpress.KnormPress(
                compression_ratio=max(0.0, 1 - options.budget / length)
            ),
            decoding_press=kvpress.DecodingPress(
                base_press=kvpress.KnormPress(),
                compression_interval=options.interval,
                target_size=options.budget,
            ),
        )
        cache = transformers.DynamicCache()
        with press(model):
            position = torch.arange(length)
            for step in range(count):
                found = model(
                    input_ids=ids,
                    past_key_values=cache,
                    position_ids=position[None],
                    # Hooks of kvpress ask for it; transformers 5 passes none itself.
                    cache_position=position,
                    logits_to_keep=1,
                )
                ids = found.logits[:, -1:].argmax(-1)
                position = torch.tensor([length + step])
        held = cache.get_seq_length()
        if count > options.interval and held > options.budget + options.interval:
            raise RuntimeError(f"kvpress holds {held} tokens, over the budget")

    return generate, {name: version(name) for name in ("kvpress", "transformers")}


def our_engine(options: argparse.Namespace) -> tuple[Generate, dict[str, str]]:
    """VLLM with this plugin."""
    from vllm import LLM, SamplingParams

    from hashevict_vllm.bench.scenarios import own_pool
    from hashevict_vllm.config import kv_policy

    # Whole prompts are held while they are read.
    tokens = options.batch * (options.prompt + options.output + 256)
    llm = LLM(
        options.model,
        dtype="bfloat16",
        max_num_seqs=options.batch,
        max_model_len=options.prompt + options.output + 64,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=own_pool(options.model, 1.2 * tokens),
        additional_config=kv_policy(budget=options.budget),
    )

    def generate(batch: list[list[int]], count: int) -> None:
        given: Any = [{"prompt_token_ids": ids} for ids in batch]
        asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        llm.generate(given, asked, use_tqdm=False)

    return generate, {"vllm": version("vllm")}


def main() -> None:
    """Time answers of one token, and whole ones; their difference is decoding."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--engine", choices=["kvpress", "ours"], required=True)
    add("--model", required=True)
    for name in ("batch", "prompt", "output", "budget", "interval", "threads"):
        add(f"--{name}", type=int, required=True)
    add("--eager", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    from transformers import AutoConfig

    vocabulary = AutoConfig.from_pretrained(options.model).vocab_size
    batch = prompts(options.batch, options.prompt, vocabulary)
    make = kvpress_engine if options.engine == "kvpress" else our_engine
    generate, versions = make(options)
    generate(batch, 2)
    seconds = {}
    for name, count in (("prompt", 1), ("all", options.output)):
        start = time.perf_counter()
        generate(batch, count)
        seconds[name] = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
