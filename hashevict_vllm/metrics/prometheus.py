"""The metrics of a budget, on vLLM's own registry and page.

`METRICS` is the one list of their names; docs/metrics.md holds the same table, and a
test compares it with what a server exports. Counters move while requests run; gauges
are renewed at most once per `REFRESH_S`, as they look at every running request.

With several API servers each counts its own requests, and vLLM's registry adds up what
their files hold (vllm/v1/metrics/prometheus.py), as it does for its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from hashevict_vllm.config import policy_of
from hashevict_vllm.host import block_size_of, resolve
from hashevict_vllm.metrics.counts import (
    Progress,
    evicted_tokens,
    kept_ratio,
    live_slots,
)
from hashevict_vllm.request_budget import asked_budget
from hashevict_vllm.shared import CAPACITY, EVICTION_SECONDS

PREFIX = "hashevict:"
LABELS = ("model_name", "engine")
REFRESH_S = 0.5
KEPT_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.0)
"""All but the last hold requests that have lost something."""

METRICS: Mapping[str, tuple[type, str, tuple[str, ...]]] = {
    "info": (
        Gauge,
        "The KV policy that is served; always 1.",
        ("policy", "scoring", "budget", "hash_bits", "segment", "version"),
    ),
    "evicted_tokens": (
        Counter,
        "Tokens evicted per KV head, while prompts were read and after.",
        ("phase",),
    ),
    "written_tokens": (
        Counter,
        "Tokens whose K and V were written, prefix-cache hits among them.",
        (),
    ),
    "requests_over_budget": (
        Counter,
        "Requests that have grown beyond their budget and so evict.",
        (),
    ),
    "eviction_seconds": (
        Counter,
        "Seconds in which layers wrote tokens, chose victims and reduced prompts.",
        (),
    ),
    "replays": (
        Counter,
        "Preempted requests that had generated tokens, which are evicted again.",
        (),
    ),
    "replayed_tokens": (Counter, "Generated tokens computed again for that.", ()),
    "live_slots": (
        Gauge,
        "Tokens that the requests which generate now keep per KV head.",
        (),
    ),
    "blocks_held": (
        Gauge,
        "Blocks per budgeted KV-cache group that they hold for those tokens.",
        (),
    ),
    "blocks_saved": (
        Gauge,
        "Blocks per group that they would hold besides without a budget.",
        (),
    ),
    "capacity_requests": (
        Gauge,
        "Requests of any length that the KV pool serves at once.",
        (),
    ),
    "request_kept_ratio": (
        Histogram,
        "Share of a finished request's tokens that its cache still held.",
        (),
    ),
}
"""Name without prefix: kind, meaning, labels besides `LABELS`."""

SHARED = ("eviction_seconds", "capacity_requests")
"""Those of `hashevict_vllm.shared`: there where a process of the machine writes."""


class KVPolicyStatLogger(AggregateStatLoggerBase):
    """Beside vLLM's `PrometheusStatLogger`; made where a policy is on.

    Args:
        vllm_config: The engine's configuration, with an enabled policy.
        engine_indexes: Engines of this client, as ``engine`` labels.

    """

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None
    ) -> None:
        self._engines = engine_indexes or [0]
        self._model = vllm_config.model_config.served_model_name
        self._block_size = block_size_of(vllm_config)
        config = policy_of(vllm_config.additional_config)
        self._policy = resolve(config, vllm_config)
        # By engine and request: budget, and tokens written.
        self._tokens: dict[int, dict[str, tuple[int, int]]] = {
            i: {} for i in self._engines
        }
        self._alive: dict[int, Iterable[str]] = {}
        self._renewed = dict.fromkeys(self._engines, 0.0)
        self._seconds = dict.fromkeys(self._engines, 0.0)
        # All of several API servers could read the same numbers: one of them does.
        self._reads_shared = vllm_config.parallel_config._api_process_rank <= 0
        self._metrics = _make_metrics()
        policy = self._policy
        for engine in self._engines:
            values = (policy.scoring, policy.budget, policy.hash_bits, policy.segment)
            named = [policy.name, *map(str, values), version("hashevict-vllm")]
            self._metric("info", engine, *named).set(1)
            # Series that exist from the start can be alerted on.
            for phase in ("prompt", "output"):
                self._metric("evicted_tokens", engine, phase)
            for name, (_, _, labels) in METRICS.items():
                if not labels and name not in SHARED:
                    self._metric(name, engine)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what one step of an engine did, as vLLM's own loggers do."""
        if iteration_stats is not None:
            # Neither is there in a step without an output (vllm_patches/request_stats).
            for progress in getattr(iteration_stats, "request_progress", ()):
                self._count(Progress.of(*progress), engine_idx)
            if (alive := getattr(iteration_stats, "request_states", None)) is not None:
                self._alive[engine_idx] = alive
            ratio = self._metric("request_kept_ratio", engine_idx)
            for done in iteration_stats.finished_requests:
                tokens = done.num_prompt_tokens + done.num_generation_tokens - 1
                budget = self._budget(asked_budget(getattr(done, "extra_args", None)))
                ratio.observe(kept_ratio(budget, tokens))
        self._renew_gauges(engine_idx)

    def log_engine_initialized(self) -> None:
        """Show what is known before the first request; `info` is there already."""
        for engine in self._engines:
            self._renew_shared(engine)

    def _count(self, progress: Progress, engine: int) -> None:
        budget = self._budget(progress.budget)
        now = evicted_tokens(budget, progress.prompt_len, progress.after)
        earlier = evicted_tokens(budget, progress.prompt_len, progress.before)
        for phase, more in zip(
            ("prompt", "output"), map(int.__sub__, now, earlier), strict=True
        ):
            if more:
                self._metric("evicted_tokens", engine, phase).inc(more)
        written = progress.after - progress.before
        self._metric("written_tokens", engine).inc(written)
        if progress.before <= budget < progress.after:
            self._metric("requests_over_budget", engine).inc()
        generated = progress.before - progress.prompt_len
        if progress.preemptions and generated > 0:
            self._metric("replays", engine).inc(progress.preemptions)
            self._metric("replayed_tokens", engine).inc(
                progress.preemptions * generated
            )
        self._tokens[engine][progress.request_id] = budget, progress.after

    def _budget(self, asked: int | None) -> int:
        """C of a request that asks for it, or for none."""
        return self._policy.budget if asked is None else asked

    def _renew_gauges(self, engine: int) -> None:
        alive, tokens = self._alive.get(engine, ()), self._tokens[engine]
        now = time.monotonic()
        if alive and now - self._renewed[engine] < REFRESH_S:
            return
        self._renewed[engine] = now
        for gone in [request for request in tokens if request not in alive]:
            del tokens[gone]
        live = [live_slots(*counts) for counts in tokens.values()]
        held = sum(cdiv(slots, self._block_size) for slots in live)
        stock = sum(cdiv(n, self._block_size) for _, n in tokens.values())
        self._metric("live_slots", engine).set(sum(live))
        self._metric("blocks_held", engine).set(held)
        self._metric("blocks_saved", engine).set(stock - held)
        self._renew_shared(engine)

    def _renew_shared(self, engine: int) -> None:
        """Show what the engine's processes have written since the last time."""
        if not self._reads_shared:
            return
        if (requests := CAPACITY.read(engine)) is not None:
            self._metric("capacity_requests", engine).set(requests)
        seconds = EVICTION_SECONDS.read(engine)
        if seconds is not None:
            more = max(seconds - self._seconds[engine], 0.0)
            self._metric("eviction_seconds", engine).inc(more)
            self._seconds[engine] = seconds

    def _metric(self, name: str, engine: int, *labels: str) -> Any:
        return self._metrics[name].labels(self._model, str(engine), *labels)


def _make_metrics() -> dict[str, Any]:
    """Register `METRICS`; those of an engine before this one, if any, go."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
    made = {}
    for name, (kind, meaning, labels) in METRICS.items():
        options: dict[str, Any] = {}
        if kind is Gauge:  # what every API server has of its own is added up
            options["multiprocess_mode"] = "mostrecent" if labels else "livesum"
        elif kind is Histogram:
            options["buckets"] = KEPT_BUCKETS
        made[name] = kind(PREFIX + name, meaning, [*LABELS, *labels], **options)
    return made
