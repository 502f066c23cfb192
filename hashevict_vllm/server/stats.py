"""The policy's metrics as JSON: what `/metrics` shows, of all API servers."""

from __future__ import annotations

from vllm.v1.metrics.prometheus import get_prometheus_registry

from hashevict_vllm.metrics.prometheus import PREFIX
from hashevict_vllm.server.schemas import Sample, Stats

NOT_COUNTS = "_created"
"""Suffix of Prometheus' times of birth."""


def current_stats() -> Stats:
    """Every series whose name begins with `PREFIX`; none with --disable-log-stats."""
    metrics: dict[str, list[Sample]] = {}
    for family in get_prometheus_registry().collect():
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            if name == sample.name or name.endswith(NOT_COUNTS):
                continue
            found = Sample(labels=dict(sample.labels), value=sample.value)
            metrics.setdefault(name, []).append(found)
    return Stats(metrics=metrics)
