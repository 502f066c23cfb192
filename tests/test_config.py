"""Defaults, presets, validation and resolution of `KVPolicyConfig`."""

import dataclasses
from typing import Any

import pytest

from hashevict_vllm import config
from hashevict_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    PRESETS,
    KVPolicyConfig,
    KVPolicyError,
    kv_policy,
)

ON = {"name": "hashevict", "budget": 1024}


def policy(**options):
    return KVPolicyConfig.from_dict({**ON, **options})


def message_of(options):
    with pytest.raises(KVPolicyError) as caught:
        KVPolicyConfig.from_dict(options)
    return str(caught.value)


@pytest.mark.parametrize("options", [None, {}, {"name": "full"}])
def test_no_options_and_full_both_mean_stock_vllm(options):
    assert not KVPolicyConfig.from_dict(options).enabled


def test_a_name_and_a_budget_are_enough():
    found = policy()
    assert found.enabled
    assert (found.budget, found.hash_bits, found.segment) == (1024, 64, 4096)


def test_a_validated_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy().budget = 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_options(preset):
    config = policy(preset=preset)
    for key, value in PRESETS[preset].items():
        assert getattr(config, key) == value


def test_the_presets_differ_in_what_is_compared_with_the_keys():
    assert policy(preset="paper").hash_source == "query"
    assert policy(preset="reference").hash_source == "key"


def test_an_explicit_key_wins_over_the_preset():
    config = policy(preset="paper", recent=64)
    assert (config.recent, config.hash_bits) == (64, 16)


def test_none_means_that_a_key_was_not_given():
    assert policy(hash_bits=None, preset=None) == policy()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("hash_bit", "hash_bits"), ("sink", "sinks"), ("budgt", "budget")],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(wrong, right):
    text = message_of({**ON, wrong: 1})
    assert f"unknown key {wrong!r}; did you mean {right!r}?" in text


def test_an_unknown_key_with_no_near_name_lists_the_valid_keys():
    text = message_of({**ON, "xyzzy": 1})
    assert all(field.name in text for field in dataclasses.fields(KVPolicyConfig))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"name": "hashevict"}, "--kv-budget"),
        ({"budget": 1024}, "--kv-budget"),
        ({**ON, "name": "hashevic"}, "--kv-policy"),
        ({**ON, "budget": 0}, "--kv-budget"),
        ({**ON, "budget": -1}, "--kv-budget"),
        ({**ON, "budget": 1.5}, "--kv-budget"),
        ({**ON, "budget": True}, "--kv-budget"),
        ({**ON, "budget": "many"}, "--kv-budget"),
        ({**ON, "budget": "0%"}, "--kv-budget"),
        ({**ON, "budget": "101%"}, "--kv-budget"),
        ({**ON, "budget": "nan%"}, "--kv-budget"),
        ({**ON, "budget": "x%"}, "--kv-budget"),
        ({**ON, "preset": "papers"}, "--kv-policy-config.preset"),
        ({**ON, "scoring": "instance"}, "--kv-policy-config.scoring"),
        ({**ON, "hash_source": "value"}, "--kv-policy-config.hash_source"),
        ({**ON, "hash_bits": 0}, "--kv-policy-config.hash_bits"),
        ({**ON, "hash_bits": 132}, "--kv-policy-config.hash_bits"),
        ({**ON, "hash_bits": 18}, "--kv-policy-config.hash_bits"),
        ({**ON, "hash_bits": "x"}, "--kv-policy-config.hash_bits"),
        ({**ON, "orthogonal": "yes"}, "--kv-policy-config.orthogonal"),
        ({**ON, "sinks": -1}, "--kv-policy-config.sinks"),
        ({**ON, "recent": "200%"}, "--kv-policy-config.recent"),
        ({**ON, "segment": 0}, "--kv-policy-config.segment"),
        ({**ON, "segment": "prompts"}, "--kv-policy-config.segment"),
        ({**ON, "seed": []}, "--kv-policy-config.seed"),
        ({**ON, "window": 0}, "--kv-policy-config.window"),
        ({**ON, "vote_every": 0}, "--kv-policy-config.vote_every"),
        ({**ON, "decay": 1.5}, "--kv-policy-config.decay"),
        ({**ON, "decay": True}, "--kv-policy-config.decay"),
        ({**ON, "decay": 10**400}, "--kv-policy-config.decay"),
        ({**ON, "budget": 10**30}, "--kv-budget"),
        ({**ON, "budget": 10**5000}, "--kv-budget"),
        ({**ON, "hash_bits": True}, "--kv-policy-config.hash_bits"),
        ({**ON, "sinks": False}, "--kv-policy-config.sinks"),
        ({**ON, "segment": True}, "--kv-policy-config.segment"),
        ({**ON, "sinks": 2**31}, "--kv-policy-config.sinks"),
        ({**ON, "recent": 2**31}, "--kv-policy-config.recent"),
        ({**ON, "segment": 2**31}, "--kv-policy-config.segment"),
        ({**ON, "seed": 2**63}, "--kv-policy-config.seed"),
        ({**ON, "window": 10**20}, "--kv-policy-config.window"),
        ({**ON, "pool": 10**20}, "--kv-policy-config.pool"),
        ({**ON, "vote_every": 10**20}, "--kv-policy-config.vote_every"),
        ({**ON, "hash_source": "query"}, "--kv-policy-config.hash_source"),
        ({**ON, "preset": "paper", "pool": 3}, "--kv-policy-config.pool"),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence_that_names_its_flag(options, flag):
    text = message_of(options)
    assert text.startswith(f"{flag}: ")
    assert text.endswith((".", "?"))
    assert "\n" not in text


@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), "9" * 5000, [0] * 5000],
    ids=["large", "small", "text", "list"],
)
@pytest.mark.parametrize("key", KVPolicyConfig.keys())
def test_values_of_any_length_are_refused_in_one_short_sentence(key, value):
    text = message_of({**ON, key: value})
    assert text.startswith(("--kv-", "additional_config"))
    assert len(text) < 250


def test_every_rule_has_four_sinks_by_default():
    assert (policy().sinks, policy(scoring="instant").sinks) == (4, 4)
    assert policy(preset="paper").sinks == 4
    assert KVPolicyConfig.from_dict({**ON, "name": "streaming_llm"}).sinks == 4


def test_a_token_must_stay_until_a_query_has_voted_on_it():
    assert policy(recent=8, vote_every=8).resolve(8192, 128).recent == 8
    with pytest.raises(KVPolicyError, match="recent: 7 tokens is less than vote_every"):
        policy(recent=7, vote_every=8).resolve(8192, 128)


@pytest.mark.parametrize(
    ("budget", "options", "every", "votes"),
    [
        (4096, {}, 8, 0.022),
        (1024, {}, 8, 0.175),
        (512, {}, 4, 0.494),
        (307, {}, 2, 1.064),
        (100, {}, 1, 3.0),
        (100, {"vote_every": 8}, 8, 3.0),
        (100, {"value_votes": 0}, 1, 0.0),
        (4096, {"value_votes": 2}, 8, 2.0),
    ],
)
def test_small_budgets_vote_more_often_and_more_for_large_values(
    budget: int, options: dict[str, Any], every: int, votes: float
) -> None:
    resolved = policy(budget=budget, **options).resolve(8192, 32)
    assert resolved.vote_every == every
    assert resolved.value_votes == pytest.approx(votes, abs=5e-4)


@pytest.mark.parametrize("budget", [100, 512, 1024, 4096])
def test_votes_fade_alike_at_every_budget(budget: int) -> None:
    assert policy(budget=budget).resolve(8192, 32).decay == 0.95
    assert policy(budget=budget, decay=0.5).resolve(8192, 32).decay == 0.5


def test_options_that_are_not_a_dict_are_refused():
    assert "expected a dict" in message_of("hashevict")


def test_numbers_may_come_as_text_from_a_command_line():
    assert policy(budget="512", segment="128", sinks="2") == policy(
        budget=512, segment=128, sinks=2
    )


def test_shares_become_tokens_once_the_model_is_known():
    resolved = policy(budget="25%", recent="50%").resolve(8192, 128)
    assert (resolved.budget, resolved.recent) == (2048, 1024)


def test_a_whole_prompt_segment_covers_the_longest_request_in_whole_blocks():
    assert policy(segment="prompt").resolve(8100, 128).segment == 8192


@pytest.mark.parametrize("budget", [8193, 2**31, 4 * 10**9, 10**12])
def test_a_budget_beyond_the_longest_request_is_cut_to_it(budget):
    resolved = policy(budget=budget).resolve(8192, 128)
    assert (resolved.budget, resolved.recent) == (8192, 2048)


def test_a_segment_beyond_the_longest_request_is_the_whole_prompt():
    assert policy(segment=2**30).resolve(8100, 128).segment == 8192


def test_the_largest_numbers_fit_where_they_go():
    largest = {
        "budget": config.MAX_BUDGET,
        "sinks": config.MAX_TOKENS,
        "recent": config.MAX_TOKENS,
        "segment": config.MAX_TOKENS,
        "seed": config.MAX_SEED,
        "window": config.MAX_VOTES,
        "pool": config.MAX_VOTES,
        "vote_every": config.MAX_VOTES,
    }
    resolved = policy(**largest).resolve(2**20, 128)
    assert resolved.seed < 2**63
    tokens = (resolved.budget, resolved.segment, resolved.sinks, resolved.recent)
    # Kernels compare them with positions, int32.
    assert all(number <= 2**30 for number in tokens)


def test_a_budget_too_small_for_large_blocks_is_told_of_smaller_ones():
    with pytest.raises(KVPolicyError, match=r"= 148\); use more\.$"):
        policy(budget=147, recent=112).resolve(8192, 32)
    with pytest.raises(KVPolicyError, match=r"smaller blocks: --block-size 32\.$"):
        policy(budget=100).resolve(8192, 128)


def test_token_by_token_needs_no_multiple_of_the_block_size():
    assert policy(segment=1).resolve(8192, 128).segment == 1


def test_a_segment_across_blocks_is_refused():
    with pytest.raises(KVPolicyError, match="100 is not a multiple of the block size"):
        policy(segment=100).resolve(8192, 128)


def test_the_smallest_budget_holds_sinks_recent_and_one_block():
    fits = policy(budget=4 + 10 + 128, recent=10, sinks=4)
    assert fits.resolve(8192, 128).budget == 142
    with pytest.raises(KVPolicyError, match=r"141 tokens is smaller .* = 142"):
        policy(budget=141, recent=10, sinks=4).resolve(8192, 128)


def test_the_python_helper_builds_what_additional_config_takes():
    options = kv_policy(budget=1024, segment="prompt")
    assert options == {
        ADDITIONAL_CONFIG_KEY: {
            "name": "hashevict",
            "budget": 1024,
            "segment": "prompt",
        }
    }


def test_the_python_helper_refuses_a_wrong_key_at_once():
    with pytest.raises(KVPolicyError, match="did you mean 'budget'"):
        kv_policy(budgets=1024)
