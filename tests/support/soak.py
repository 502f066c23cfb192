"""A long run over HTTP, and what must be true after it; see scripts/soak."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from hashevict_vllm.bench.server import serve
from support.models import VOCAB, add_byte_tokenizer, make_llama
from support.soak_requests import Answer, Load, Request, send_all

PIECE = 250
"""Requests between two looks at an idle server."""

FLAT = 1.02
"""What memory may grow to, once the pool's pages have all been touched."""

BUDGET, MODEL = 160, "random"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
FLAGS += ["--max-model-len", "2048", "--max-num-seqs", "32"]
# A pool that preempts now and then: 128 blocks of 32 tokens.
FLAGS += ["--num-gpu-blocks-override", "128", "--served-model-name", MODEL]
POLICY = ["--kv-budget", str(BUDGET), "--kv-policy-config.segment", "64"]
POLICY += ["--kv-policy-config.allow_full", "true"]

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
"""Without one the random model has no chats, and every one is a 400."""

BUDGETS = (None, 64, 96, 128, BUDGET, "full")
"""Of requests, drawn from; None asks for none."""


def wait_until_idle(url: str, seconds: float = 60) -> list[str]:
    """Wait for the server's last request; what of the pool is still held then.

    Returns:
        Sentences, none if nothing runs, waits or holds a block.

    """
    deadline = time.monotonic() + seconds
    while True:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        pattern = r"^((?:vllm:(?:num_requests_running|num_requests_waiting|"
        pattern += r"kv_cache_usage_perc)|hashevict:blocks_held)){.*} (\S+)$"
        found = {name: float(value) for name, value in re.findall(pattern, text, re.M)}
        busy = [f"{name} is {value}" for name, value in found.items() if value]
        if not busy or time.monotonic() > deadline:
            return busy
        time.sleep(0.2)


def processes(url: str) -> list[psutil.Process]:
    """A server of this machine and all that it has started."""
    port = int(url.rpartition(":")[2])
    (pid,) = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def memory(url: str) -> dict[str, int]:
    """Bytes that belong to each of the server's processes alone (USS)."""
    return {p.name(): p.memory_full_info().uss for p in processes(url)}


def alone(url: str, answers: list[Answer], count: int, seed: int) -> list[str]:
    """Send a sample again, one by one and with nothing cached.

    Returns:
        A sentence for every answer that differs.

    """
    candidates = [a for a in answers if a.request.can_be_compared and not a.error]
    sample = random.Random(seed).sample(candidates, min(count, len(candidates)))
    again = [replace_salt(answer.request) for answer in sample]
    repeated = asyncio.run(send_all(url, again, in_flight=1))
    return [
        f"request {then.request.number}: another answer alone"
        for then, now in zip(sample, repeated, strict=True)
        if then.tokens != now.tokens
    ] + ([] if len(sample) == count else [f"only {len(sample)} answers to compare"])


def replace_salt(request: Request) -> Request:
    """The same request, which no cached prefix serves."""
    salted = {**request.body, "cache_salt": f"alone {request.number}"}
    return replace(request, body=salted)


def soak(
    url: str, load: Load, requests: int, in_flight: int, sample: int, piece: int = PIECE
) -> list[str]:
    """Run the load; prints what happened.

    Returns:
        What was wrong, one sentence each.

    """
    wrong, answers, start = [], [], time.monotonic()
    sizes: list[int] = []
    for first in range(0, requests, piece):
        numbers = range(first, min(first + piece, requests))
        drawn = [load.request(number) for number in numbers]
        found = asyncio.run(send_all(url, drawn, in_flight))
        answers += found
        wrong += [f"request {a.request.number}: {a.error}" for a in found if a.error]
        wrong += wait_until_idle(url)
        found_bytes = memory(url)
        sizes.append(sum(found_bytes.values()))
        parts = (f"{name} {size >> 20}" for name, size in found_bytes.items())
        print(
            f"{len(answers)} requests, {time.monotonic() - start:.0f} s, "
            f"{sizes[-1] / 2**20:.1f} MiB ({', '.join(parts)})",
            flush=True,
        )
    fates = Counter(answer.request.fate for answer in answers)
    tokens = sum(len(answer.tokens) for answer in answers)
    print(f"{dict(fates)}, {tokens} tokens received")
    # The first half touches every page of the pool and fills allocators.
    settled = sizes[len(sizes) // 2 :]
    if len(sizes) >= 4 and max(settled) > FLAT * settled[0]:
        wrong.append(f"memory grew from {settled[0]} to {max(settled)} bytes")
    differ = alone(url, answers, sample, load.seed)
    print(f"{sample - len(differ)} of {sample} answers equal to those served alone")
    return wrong + differ


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/soak")
    add = parser.add_argument
    add("--url", help="a server on this machine; started here if not given")
    add("--model", default=MODEL, help="its served name")
    add("--policy", default="hashevict", help="of the server that is started")
    add("--requests", type=int, default=2000)
    add("--in-flight", type=int, default=24)
    add("--sample", type=int, default=50, help="answers that are asked for again")
    add("--prompt", type=int, default=700, help="most tokens of a prompt")
    add("--output", type=int, default=60, help="most tokens of an answer")
    add("--budgets", nargs="*", help="values of kv_budget to draw from")
    add("--seed", type=int, default=0)
    add("--fuzz", type=int, default=0, metavar="N", help="examples of schemathesis")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            flags = [*FLAGS, "--kv-policy", options.policy]
            flags += ["--chat-template", TEMPLATE]
            flags += POLICY if options.policy != "full" else []
            model = add_byte_tokenizer(make_llama(folder / "model"))
            server = serve(
                model, flags, folder / "log", {"VLLM_CPU_KVCACHE_SPACE": "1"}
            )
            url = stack.enter_context(server).url
        own = options.url is None and options.policy != "full"
        budgets = BUDGETS if own else ()
        if options.budgets is not None:
            budgets = [int(b) if b.isdigit() else b for b in options.budgets]
        sizes = (options.prompt, options.output)
        load = Load(options.model, (10, VOCAB), *sizes, budgets, options.seed)
        wrong = soak(url, load, options.requests, options.in_flight, options.sample)
        if options.fuzz:
            from support.fuzz import fuzz

            wrong += fuzz(url, options.model, options.fuzz)
    for sentence in wrong:
        print(f"WRONG: {sentence}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
