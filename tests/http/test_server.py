"""``vllm serve --kv-policy hashevict`` over HTTP, driven by the ``openai`` client."""

from __future__ import annotations

import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from support.server import BUDGET, KEY, MODEL, server_env, vllm_command

from hashevict_vllm.config import POLICY_NAMES

pytestmark = pytest.mark.http

CITIES = ("Lisbon", "Oslo", "Prague", "Vienna", "Dublin", "Athens", "Warsaw", "Bern")
COMMON_WORDS = {"the", "of", "and", "to", "a", "in", "is", "it", "that", "as", "for"}
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Germany": "Berlin"}


def facts(count, first=1):
    """Numbered sentences of about 30 tokens each."""
    return " ".join(
        f"Fact {i}: on day {i} the train from {CITIES[i % 8]} to "
        f"{CITIES[(3 * i + 1) % 8]} carried {100 + 37 * i % 400} passengers and "
        f"{5 + 13 * i % 60} parcels of mail."
        for i in range(first, first + count)
    )


def complete(client, prompt, tokens, **options):
    """A greedy completion of exactly ``tokens`` tokens unless told otherwise."""
    exactly = {"ignore_eos": True, "min_tokens": tokens}
    options = {"temperature": 0, "extra_body": exactly, **options}
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=tokens, **options
    )


def chat(client, question, tokens, **options):
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        **{"temperature": 0, **options},
    )


def assert_fluent(text):
    """English words, enough of them distinct, and among them the commonest ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    assert len(words) >= 30, text
    assert len(set(words)) >= 0.4 * len(words), text
    assert sum(word.isascii() for word in words) >= 0.95 * len(words), text
    assert sum(word in COMMON_WORDS for word in words) >= 0.15 * len(words), text


# -- refused starts --------------------------------------------------------------

ON = ("--kv-policy", "hashevict", "--kv-budget", "1024")
REFUSED = {
    "no budget": (
        ON[:2],
        "vllm: error: --kv-budget: is required with --kv-policy hashevict: tokens per "
        "KV head, or a share of max_model_len such as 25%.",
    ),
    "tiny budget": (
        (*ON[:3], "10"),
        "vllm: error: --kv-budget: 10 tokens is smaller than sinks + recent + one "
        "block (4 + 2 + 128 = 134); use more, or smaller blocks: --block-size 32.",
    ),
    "unknown policy": (
        ("--kv-policy", "hashevit", *ON[2:]),
        "vllm serve: error: argument --kv-policy: invalid choice: 'hashevit' (choose "
        f"from {', '.join(map(repr, POLICY_NAMES))})",
    ),
    "prefix caching": (
        (*ON, "--kv-policy-config.preset", "paper", "--enable-prefix-caching"),
        "vllm: error: --enable-prefix-caching: needs scoring 'vote', as the other "
        "rules judge a prompt by queries that a cached prefix no longer computes; drop "
        "the flag or use --kv-policy hashevict with its default scoring.",
    ),
}


@pytest.fixture(scope="module")
def refused_starts(smollm):
    """The `REFUSED` commands, run side by side: each is busy importing for seconds."""

    def start(flags):
        return subprocess.run(
            [vllm_command(), "serve", str(smollm), *flags],
            env=server_env(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    with ThreadPoolExecutor() as pool:
        results = pool.map(start, [flags for flags, _ in REFUSED.values()])
        return dict(zip(REFUSED, results, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_flags_end_the_start_with_one_sentence(name, refused_starts):
    result = refused_starts[name]
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == REFUSED[name][1]
    assert "Traceback" not in result.stderr


# -- the log ---------------------------------------------------------------------


def test_the_log_says_what_the_budget_buys(server):
    sentence = re.search(r"KV budget: .*", server.log())
    assert sentence
    assert sentence[0].startswith(
        f"KV budget: {BUDGET} tokens per KV head. A request holds at most 8 blocks"
    )
    assert "requests of any length at once" in sentence[0]


def test_a_second_turn_hits_the_first_ones_blocks(server, client):
    """Of a prompt beyond the budget, as usage and vLLM's metrics count them."""
    first = [{"role": "user", "content": f"{facts(90)}\n\nHow many trains?"}]
    more = [{"role": "assistant", "content": "Ninety."}]
    more += [{"role": "user", "content": "And how many cities?"}]
    before = server.metric("prefix_cache_hits_total")
    cached = []
    for messages in (first, first + more):
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=4, temperature=0
        )
        assert answer.usage.prompt_tokens > BUDGET
        cached.append(answer.usage.prompt_tokens_details)
    assert cached[0] is None or cached[0].cached_tokens < 128
    assert cached[1].cached_tokens >= (answer.usage.prompt_tokens - 200) // 128 * 128
    hits = server.metric("prefix_cache_hits_total") - before
    assert hits >= cached[1].cached_tokens


# -- the API ---------------------------------------------------------------------


def test_chat_answers_a_question(client):
    answer = chat(client, "What is the capital of France?", 32)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_completions_continue_a_prompt(client):
    answer = complete(client, "The capital of France is", 8)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def test_a_stream_joins_to_the_text_of_one_piece_also_past_the_budget(client):
    prompt = facts(33)
    whole = complete(client, prompt, 64)
    assert whole.usage.prompt_tokens < BUDGET < whole.usage.total_tokens
    chunks = list(complete(client, prompt, 64, stream=True))
    assert len(chunks) > 30
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_n_gives_as_many_different_answers(client):
    answer = complete(client, "Once upon a time", 24, n=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.text for choice in answer.choices)
    assert first != second


def test_logprobs_name_the_greedy_token_first(client):
    # vLLM compiles a kernel for the first one: half a minute on a fresh machine.
    answer = chat(client, "Name a colour.", 8, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert tokens
    for token in tokens:
        likely = [alternative.logprob for alternative in token.top_logprobs]
        assert len(likely) == 3
        assert likely == sorted(likely, reverse=True)
        assert token.logprob == likely[0]
        assert -10 < likely[0] <= 0


def test_prompt_logprobs_cover_a_prompt_longer_than_the_budget(client):
    options = {"extra_body": {"prompt_logprobs": 0}}
    answer = complete(client, facts(45), 1, **options)
    first, *others = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(others) == answer.usage.prompt_tokens - 1 > BUDGET
    logprobs = [next(iter(token.values()))["logprob"] for token in others]
    assert all(math.isfinite(logprob) for logprob in logprobs)
    # The sentences are alike, so a model that still sees some of them guesses well.
    beyond = logprobs[BUDGET:]
    print(f"mean logprob beyond the budget: {sum(beyond) / len(beyond):.2f}")
    assert sum(beyond) / len(beyond) > -1


def test_a_stop_string_ends_the_text_before_it(client):
    answer = complete(client, "1, 2, 3, 4,", 32, stop=["8"], extra_body={})
    assert answer.choices[0].text == " 5, 6, 7, "
    assert answer.choices[0].finish_reason == "stop"


# -- bad luck --------------------------------------------------------------------


def test_a_stream_that_is_closed_gives_its_blocks_back(server, client):
    stream = complete(client, facts(10), 4000, stream=True)
    for _ in range(5):
        next(stream)
    assert server.metric("num_requests_running") == 1
    stream.close()
    server.wait_until_idle()
    assert chat(client, "What is the capital of France?", 16).choices


def test_a_client_that_leaves_while_its_prompt_is_read_gives_its_blocks_back(server):
    with server.client(timeout=3) as hasty, pytest.raises(openai.APITimeoutError):
        complete(hasty, facts(200), 2000)
    server.wait_until_idle()
    with server.client() as client:
        assert chat(client, "What is the capital of France?", 16).choices


BAD_BUDGETS = {
    "much": "expected tokens or 'full', got 'much'.",
    1.5: "expected an integer, got 1.5.",
    0: "must be at least 175, got 0.",
    BUDGET + 1: f"must be at most {BUDGET}.",
}


def test_wrong_requests_get_a_4xx_and_leave_their_neighbour_unharmed(server, client):
    prompt = "Once upon a time"
    alone = complete(client, prompt, 128).choices[0].text
    # A busy machine may leave this process without a core until the neighbour ends.
    for _ in range(3):
        neighbour = complete(client, prompt, 128, stream=True)
        text = next(neighbour).choices[0].text
        send_wrong_requests(server, client)
        still_running = server.metric("num_requests_running")
        text += "".join(chunk.choices[0].text for chunk in neighbour)
        assert text == alone
        if still_running:
            break
    assert still_running == 1


def send_wrong_requests(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="nobody", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(client, "Hello", -1, extra_body={})
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192"):
        complete(client, [1] * 9000, 1, extra_body={})
    for budget, reason in BAD_BUDGETS.items():
        asked = {"vllm_xargs": {"kv_budget": budget}}
        with pytest.raises(openai.BadRequestError, match=f"kv_budget: {reason}"):
            complete(client, "Hello", 1, extra_body=asked)
    broken = httpx.post(
        f"{server.url}/v1/completions",
        content=b'{"model":',
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {KEY}",
        },
    )
    assert broken.status_code == 400
    assert "JSON" in broken.json()["error"]["message"]


# -- load ------------------------------------------------------------------------


def test_a_prompt_of_6000_tokens_is_answered_in_fluent_text(client):
    question = f"{facts(199)}\n\nExplain how photosynthesis works."
    answer = chat(client, question, 80)
    text = answer.choices[0].message.content
    print(f"\n{answer.usage.prompt_tokens} tokens -> {text}")
    assert 6000 <= answer.usage.prompt_tokens < 6200
    assert_fluent(text)
    assert "plant" in text.lower()


def test_metrics_tell_how_many_tokens_a_request_has_evicted(server, client):
    def evicted():
        text = httpx.get(f"{server.url}/metrics").text
        found = re.findall(
            r'^hashevict:evicted_tokens_total{.*phase="(\w+)"} (\S+)$', text, re.M
        )
        return {phase: float(value) for phase, value in found}

    before = evicted()
    usage = complete(client, facts(60), 33).usage
    now = evicted()
    assert now["prompt"] - before["prompt"] == usage.prompt_tokens - BUDGET > 0
    assert now["output"] - before["output"] == 32
    assert usage.evicted_tokens == usage.prompt_tokens - BUDGET + 32


def test_usage_adds_up_what_several_answers_evicted_also_in_streams(client):
    both = complete(client, facts(33), 64, n=2, temperature=1, seed=1).usage
    each = both.prompt_tokens + 64 - 1 - BUDGET
    assert both.evicted_tokens == 2 * each > 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = complete(client, [facts(33), "Hello"], 64, **options)
    assert last.usage.evicted_tokens == each
    assert chat(client, "Hello", 1).usage.evicted_tokens == 0


def test_a_request_may_ask_for_a_budget_of_its_own(server, client):
    """Of a chat's 1,500 tokens the metrics count what is beyond that."""

    def evicted(budget):
        name = 'hashevict:evicted_tokens_total{.*phase="prompt"}'
        counts = []
        for ask in (False, True):
            if ask:
                asked = {"vllm_xargs": {"kv_budget": budget}}
                usage = chat(client, facts(50), 2, extra_body=asked).usage
            text = httpx.get(f"{server.url}/metrics").text
            counts.append(float(re.search(rf"^{name} (\S+)$", text, re.M)[1]))
        return counts[1] - counts[0], usage

    lost, usage = evicted(512)
    assert lost == usage.prompt_tokens - 512 > BUDGET - 512
    assert usage.evicted_tokens == usage.total_tokens - 1 - 512
    lost, usage = evicted("full")
    assert lost == usage.evicted_tokens == 0


def test_32_requests_are_served_at_once_though_half_outgrow_the_budget(server, client):
    def long_one(number):
        return complete(client, facts(31, first=number - 31), 80)

    def short_one(country):
        return complete(client, f"The capital of {country} is", 24)

    numbers = [131 + 31 * i for i in range(16)]
    countries = list(CAPITALS) * 4
    with ThreadPoolExecutor(32) as pool:
        long_ones = [pool.submit(long_one, number) for number in numbers]
        short_ones = [pool.submit(short_one, country) for country in countries]

    # Every answer continues its own prompt, and none of its neighbours'.
    for number, future in zip(numbers, long_ones, strict=True):
        answer = future.result()
        assert answer.usage.completion_tokens == 80
        assert answer.usage.prompt_tokens < BUDGET < answer.usage.total_tokens
        for i in (number, number + 1):
            assert f" Fact {i}: on day {i} the train from" in answer.choices[0].text
    for country, future in zip(countries, short_ones, strict=True):
        answer = future.result()
        assert answer.usage.completion_tokens == 24
        assert answer.choices[0].text.startswith(f" {CAPITALS[country]}")
    server.wait_until_idle()
