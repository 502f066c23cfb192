"""Every rule of `rules.RULES`, read as the sentence that a user sees.

Configurations are real ones, made by ``EngineArgs.create_engine_config`` from a
directory with a ``config.json`` alone. Not so, for want of the real thing on a CPU: the
version of vLLM is monkeypatched; context parallelism, diffusion and
chunked layers are attributes set on a real configuration. R-SWA and prefix-LM are real
configurations of a Llama whose ``config.json`` carries the field that vLLM reads.
"""

import json

import pytest

from hashevict_vllm import plugin
from hashevict_vllm.compat import rules
from hashevict_vllm.config import KVPolicyConfig, KVPolicyError, kv_policy

plugin.register()

import vllm  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="the release runs on CPU only"
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
GEMMA3 = {
    **SIZES,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS = {
    "mla": {
        **SIZES,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "encoder_decoder": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "vocab_size": 128,
        "is_encoder_decoder": True,
        "dtype": "bfloat16",
    },
    "attention_free": {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "dtype": "bfloat16",
    },
    "no_full_attention": {
        **SIZES,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 256,
    },
    "mamba_hybrid": {
        **SIZES,
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
    },
    "shared_kv_layers": {
        **SIZES,
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 256,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "alibi": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 128,
        "dtype": "bfloat16",
    },
    "replay_window": {**LLAMA, "rswa_window": 128},
    "prefix_lm": {**LLAMA, "is_mm_prefix_lm": True},
}
MODEL_REASONS = {
    "mla": "multi-head latent attention",
    "encoder_decoder": "is an encoder-decoder",
    "attention_free": "has no attention layers",
    "no_full_attention": "has no full-attention layer",
    "mamba_hybrid": "mixes attention with Mamba layers",
    "shared_kv_layers": "shares the KV cache of earlier layers in 2 layers",
    "alibi": "uses ALiBi",
    "replay_window": "R-SWA",
    "prefix_lm": "attends in both directions inside images",
}
INSTANT = kv_policy(budget=512, scoring="instant")
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
# Rule: (engine arguments, flag that the sentence names, words of the reason).
FLAGS = {
    "pooling_runner": ({"runner": "pooling"}, "--kv-policy", "--runner pooling"),
    "speculative_decoding": (
        {"speculative_config": NGRAM},
        "--speculative-config",
        "cannot be taken back",
    ),
    "kv_offloading": (
        {"kv_offloading_size": 1.0},
        "--kv-offloading-size",
        "overwrites tokens inside a block",
    ),
    "prefix_caching": (
        {"enable_prefix_caching": True, "policy": INSTANT},
        "--enable-prefix-caching",
        "needs scoring 'vote'",
    ),
    "kv_sharing_fast_prefill": (
        {"kv_sharing_fast_prefill": True},
        "--kv-sharing-fast-prefill",
        "must see every token",
    ),
    "quantised_cache": (
        {"kv_cache_dtype": "fp8"},
        "--kv-cache-dtype",
        "fp8 is quantised, and on a CPU",
    ),
    "cpu_block_size": (
        {"block_size": 48},
        "--block-size",
        "48 is not a multiple of 32",
    ),
    "budget_sizes": (
        {"block_size": 512},
        "--kv-budget",
        "smaller than sinks + recent + one block",
    ),
}


def assert_is_one_sentence(text, flag):
    assert text.startswith(f"{flag}: ")
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert text.count(". ") == 0


def write_model(path, config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def llama(tmp_path):
    return write_model(tmp_path / "llama", LLAMA)


def engine_args(model, cls=EngineArgs, policy=None, **kwargs):
    return cls(
        model=model,
        skip_tokenizer_init=True,
        additional_config=kv_policy(budget=512) if policy is None else policy,
        **kwargs,
    )


def refusal(model, **kwargs):
    with pytest.raises(KVPolicyError) as caught:
        engine_args(model, **kwargs).create_engine_config()
    return str(caught.value)


def refusal_of(config):
    with pytest.raises(KVPolicyError) as caught:
        rules.check(config)
    return str(caught.value)


def test_every_rule_has_a_case():
    cases = {*MODELS, *FLAGS, "vllm_version", "kv_connector", "kv_events"}
    cases |= {"context_parallel", "hybrid_manager_off", "diffusion"}
    cases |= {"replicated_kv_heads", "inspection"}
    # tests/attention/gpu/test_device.py
    cases |= {"platform", "inner_backend", "microbatches", "device_kernels"}
    assert {rule.__name__ for rule in rules.RULES} == cases


@pytest.mark.parametrize("rule", MODELS)
def test_a_model_that_cannot_be_budgeted_is_refused_by_its_architecture(rule, tmp_path):
    text = refusal(write_model(tmp_path / rule, MODELS[rule]))
    assert_is_one_sentence(text, "--kv-policy")
    assert MODELS[rule]["architectures"][0] in text
    assert MODEL_REASONS[rule] in text


@pytest.mark.parametrize("rule", FLAGS)
def test_a_feature_that_a_policy_cannot_serve_is_refused_by_its_flag(rule, llama):
    kwargs, flag, reason = FLAGS[rule]
    text = refusal(llama, **kwargs)
    assert_is_one_sentence(text, flag)
    assert reason in text


def test_a_cache_dtype_other_than_the_models_is_refused(llama):
    options = {"kv_cache_dtype": "bfloat16", "dtype": "float16"}
    if not vllm.__version__.startswith("0.32."):  # vLLM refuses it itself
        with pytest.raises(ValueError, match="kv_cache_dtype"):
            engine_args(llama, **options).create_engine_config()
        return
    text = refusal(llama, **options)
    assert_is_one_sentence(text, "--kv-cache-dtype")
    assert "bfloat16 differs from --dtype float16" in text


def test_a_kv_connector_is_refused_by_name(llama):
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    text = refusal(llama, kv_transfer_config=transfer)
    assert_is_one_sentence(text, "--kv-transfer-config")
    assert "OffloadingConnector" in text


def test_kv_events_are_refused_where_prefix_caching_is_off(llama):
    from vllm.config.kv_events import KVEventsConfig

    events = {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True)}
    text = refusal(llama, policy=INSTANT, **events)
    assert_is_one_sentence(text, "--kv-events-config")
    engine_args(llama, **events).create_engine_config()


def test_a_diffusion_language_model_is_refused(llama):
    config = engine_args(llama).create_engine_config()
    config.diffusion_config = object()
    text = refusal_of(config)
    assert_is_one_sentence(text, "--kv-policy")
    assert "is a diffusion language model" in text


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_context_parallelism_is_refused(kind, llama):
    config = engine_args(llama).create_engine_config()
    setattr(config.parallel_config, f"{kind}_context_parallel_size", 2)
    assert_is_one_sentence(refusal_of(config), f"--{kind}-context-parallel-size")


def test_copies_of_kv_heads_are_refused_where_queries_are_asked(llama):
    config = engine_args(llama).create_engine_config()
    config.parallel_config.tensor_parallel_size = 4
    text = refusal_of(config)
    assert_is_one_sentence(text, "--tensor-parallel-size")
    assert "copies of the 2 KV heads" in text
    for options in (
        {"name": "l2_norm"},
        {"name": "hashevict", "scoring": "instant", "hash_source": "key"},
    ):
        policy = KVPolicyConfig.from_dict({"budget": 512, **options})
        assert rules.replicated_kv_heads(config, policy) is None


def test_inspection_is_refused_where_a_question_may_go_astray(llama, monkeypatch):
    args = engine_args(llama, policy=kv_policy(budget=512, inspect=True))
    config = args.create_engine_config()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert_is_one_sentence(refusal_of(config), "--kv-policy-config.inspect")
    monkeypatch.undo()
    config.parallel_config._api_process_count = 2
    text = refusal_of(config)
    assert_is_one_sentence(text, "--kv-policy-config.inspect")
    assert "use --api-server-count 1" in text


def test_sliding_window_layers_need_the_hybrid_manager(tmp_path):
    model = write_model(tmp_path / "gemma3", GEMMA3)
    text = refusal(model, disable_hybrid_kv_cache_manager=True)
    assert_is_one_sentence(text, "--disable-hybrid-kv-cache-manager")
    assert "Gemma3ForCausalLM" in text


def test_chunked_layers_are_refused_where_vllm_drops_the_hybrid_manager(llama):
    config = engine_args(llama).create_engine_config()
    config.model_config.attention_chunk_size = 256
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    flag = "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"
    assert_is_one_sentence(refusal_of(config), flag)


def test_an_unknown_vllm_version_is_refused(llama, monkeypatch):
    config = engine_args(llama).create_engine_config()
    monkeypatch.setattr("vllm.__version__", "0.34.1")
    text = refusal_of(config)
    assert text.startswith("--kv-policy: vLLM 0.34.1 is not supported")
    assert "0.32.x and 0.33.x" in text


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.32.0", True), ("0.33.1rc1", True), ("0.32.0+cpu", True), ("0.3.2", False)],
)
def test_versions_are_compared_by_minor_release(version, supported):
    assert rules.is_supported_vllm(version) is supported


def test_a_segment_across_blocks_is_refused(llama):
    text = refusal(llama, policy=kv_policy(budget=512, segment=100))
    assert_is_one_sentence(text, "--kv-policy-config.segment")


def test_a_budget_that_no_request_fills_is_asked_for_its_unit(llama, monkeypatch):
    lines = []
    monkeypatch.setattr(rules.logger, "warning", lambda s, *n: lines.append(s % n))
    for budget in (2048, "100%"):
        engine_args(llama, policy=kv_policy(budget=budget)).create_engine_config()
    assert lines == []
    engine_args(llama, policy=kv_policy(budget=4 * 10**9)).create_engine_config()
    (line,) = lines
    assert line.startswith("--kv-budget: 4000000000 tokens is more than the longest ")
    assert "(2048), so nothing will be evicted; were bytes meant?" in line


def test_a_hybrid_model_with_full_attention_layers_is_accepted(tmp_path):
    config = engine_args(write_model(tmp_path / "g", GEMMA3)).create_engine_config()
    assert rules.policy_of(config.additional_config).budget == 512


def test_tensor_and_pipeline_parallelism_are_accepted(llama):
    args = engine_args(llama, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert args.create_engine_config().parallel_config.world_size == 4


@pytest.mark.parametrize(
    "policy",
    [
        INSTANT,
        kv_policy(budget=512, preset="paper"),
        kv_policy(budget=512, preset="reference"),
        *(kv_policy(name, budget=512) for name in ("streaming_llm", "random")),
    ],
    ids=["instant", "paper", "reference", "streaming_llm", "random"],
)
def test_without_votes_prefix_caching_is_off_with_one_log_line(
    policy, llama, monkeypatch
):
    lines = []
    monkeypatch.setattr(rules.logger, "info", lines.append)
    args = engine_args(llama, cls=AsyncEngineArgs, policy=policy)
    assert args.create_engine_config().cache_config.enable_prefix_caching is False
    assert lines == ["Prefix caching is off: it needs a KV policy that votes."]
    text = refusal(llama, policy=policy, enable_prefix_caching=True)
    assert_is_one_sentence(text, "--enable-prefix-caching")


@pytest.mark.parametrize("given", [None, True, False])
def test_with_votes_prefix_caching_is_as_in_stock(given, llama, monkeypatch):
    lines = []
    monkeypatch.setattr(rules.logger, "info", lines.append)
    args = engine_args(llama, cls=AsyncEngineArgs, enable_prefix_caching=given)
    enabled = args.create_engine_config().cache_config.enable_prefix_caching
    assert enabled is (given is not False)
    assert lines == []


@pytest.mark.parametrize("policy", [{}, {"kv_policy": {"name": "full"}}])
def test_without_a_policy_nothing_is_checked_or_changed(policy, llama, monkeypatch):
    monkeypatch.setattr(rules, "RULES", (lambda config, policy: "must not run.",))
    args = engine_args(llama, policy=policy, kv_sharing_fast_prefill=True)
    config = args.create_engine_config()
    assert config.cache_config.enable_prefix_caching is True
    assert config.additional_config == policy


def test_a_policy_off_is_the_default_of_additional_config():
    assert rules.policy_of({}) == rules.policy_of(object()) == KVPolicyConfig()
