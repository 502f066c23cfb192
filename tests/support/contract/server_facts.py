"""What the routes of ``hashevict_vllm/server`` rely on."""

from __future__ import annotations

from .checks import Fact

CORE = "vllm/v1/engine/core.py:EngineCore"
PROC = "vllm/v1/engine/core.py:EngineCoreProc"
SERVING = "vllm/entrypoints/openai"

SERVER_FACTS = (
    Fact(
        "vllm/plugins/__init__.py:load_endpoint_plugins",
        "vllm_patches/endpoint_plugins.py wraps it",
        takes=("supported_tasks",),
    ),
    Fact(
        "vllm/plugins/endpoint_plugins/interface.py:attach_endpoint_plugins",
        "vllm_patches/endpoint_plugins.py replaces what this call finds",
        says=(
            "from vllm.plugins import load_endpoint_plugins",
            "plugin.attach_router(app)",
            "app.state.endpoint_plugins = endpoint_plugins",
        ),
    ),
    Fact(
        "vllm/plugins/endpoint_plugins/interface.py:init_endpoint_plugins_state",
        "server/plugin.py is handed the engine's client",
        says=("await plugin.init_state(engine_client, state, args)",),
    ),
    Fact(
        "vllm/entrypoints/launchers/app.py:build_app",
        "server/plugin.py reads the policy of the app's arguments",
        says=(
            "app.state.args = args",
            "attach_endpoint_plugins(app, supported_tasks)",
        ),
    ),
    Fact(
        "vllm/entrypoints/serve/middleware/authenticate.py",
        "an API key guards the routes, and not the page's files",
        says=("GUARDED_PREFIX = ('/v1', '/v2', '/inference', '/cohere')",),
    ),
    Fact(
        f"{PROC}._handle_client_request",
        "vllm_patches/endpoint_plugins.py adds methods that clients call between steps",
        says=(
            "EngineCoreRequestType.UTILITY",
            "(method := getattr(self, method_name)) and "
            "method(*self._convert_msgspec_args(method, args))",
        ),
    ),
    Fact(
        f"{CORE}.collective_rpc",
        "cache/retention.py reads pages in workers, after the steps before",
        takes=("self", "method", "timeout", "args", "kwargs"),
    ),
    Fact(
        "vllm/v1/engine/core_client.py:AsyncMPClient.call_utility_all_async",
        "server/service.py asks every engine",
        takes=("self", "method", "*args"),
    ),
    Fact(
        "vllm/v1/core/sched/scheduler.py:Scheduler",
        "cache/retention.py reads them",
        has=("requests", "kv_cache_manager"),
    ),
    Fact(
        "vllm/v1/core/kv_cache_manager.py:KVCacheManager.get_block_ids",
        "cache/retention.py asks for a request's blocks, by group",
        takes=("self", "request_id"),
    ),
    Fact(
        "vllm/v1/engine/output_processor.py:OutputProcessor",
        "server/lookup.py finds a request by the id that its client knows",
        has=("request_states", "external_req_ids"),
    ),
    Fact(
        "vllm/v1/engine/output_processor.py:RequestState",
        "server/lookup.py tells answers of one request apart",
        has=("request_index",),
    ),
    Fact(
        f"{SERVING}/completion/serving.py:OpenAIServingCompletion",
        "server/lookup.py knows the ids of a completion's prompts",
        says=(
            "request_id = f'cmpl-{self._base_request_id(raw_request, "
            "request.request_id)}'",
            "request_id_item = f'{request_id}-{i}'",
        ),
    ),
)
