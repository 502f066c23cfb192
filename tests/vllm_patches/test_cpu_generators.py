"""A request with a seed whose prompt takes several steps, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.engine import engine
from support.models import random_prompt

from hashevict_vllm import plugin


def sampled(llm: Any, lengths: tuple[int, ...], seed: int = 7) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=1, seed=seed, max_tokens=40, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": random_prompt(length)} for length in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_seeded_prompt_of_several_steps_draws_what_one_step_draws(
    llama: Path,
) -> None:
    """Stock vLLM; with a policy it is the same runner."""
    plugin.register()
    lengths = (400, 30)
    with engine(llama, max_num_seqs=2, max_num_batched_tokens=4096) as llm:
        expected = sampled(llm, lengths)
        assert expected != sampled(llm, lengths, seed=8)
    with engine(llama, max_num_seqs=2, max_num_batched_tokens=128) as llm:
        assert sampled(llm, lengths) == expected
        assert sampled(llm, lengths) == expected
