"""What the routes answer, as OpenAPI shows it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class KVPolicy(BaseModel):
    """The policy that is served, and what it buys."""

    version: str = Field(description="Of hashevict-vllm.")
    vllm_version: str
    policy: dict[str, Any] = Field(description="As configured; keys as in `--help`.")
    effective: dict[str, Any] = Field(
        description="The same in plain numbers, for this model: tokens, not shares."
    )
    block_size: int = Field(description="Tokens of a block.")
    num_blocks: int = Field(description="Blocks of the pool.")
    max_model_len: int
    layers: list[int] = Field(description="Indices of the layers that have a budget.")
    capacity: dict[str, float] = Field(
        description="What the pool serves: blocks and bytes of a request, requests at "
        "once, and those of stock vLLM."
    )
    inspect: bool = Field(description="Whether retention of requests can be read.")


class Sample(BaseModel):
    """One series of a metric."""

    labels: dict[str, str]
    value: float


class Stats(BaseModel):
    """The metrics of `/metrics` that begin with `hashevict:`, as JSON."""

    metrics: dict[str, list[Sample]] = Field(
        description="By name without the prefix; docs/metrics.md says what they mean."
    )


class HeldSlots(BaseModel):
    """What one KV head holds of the positions asked for, oldest first."""

    layer: int
    head: int
    positions: list[int]
    votes: list[float] | None = Field(description="None where the rule has no votes.")


class Retention(BaseModel):
    """Which positions a live request still holds, now."""

    id: str
    prompt_tokens: int
    tokens: int = Field(
        description="Positions written so far: prompt and answer, but for the newest "
        "token; 0 while the request waits."
    )
    budget: int = Field(description="Slots per KV head once the prompt is read.")
    live_slots: int = Field(
        description="Slots in use per KV head; more than the budget while a prompt "
        "segment is read."
    )
    blocks: int = Field(description="Blocks held per budgeted group of layers.")
    layers: list[int] = Field(description="Indices; a row of `held` for each.")
    kv_heads: list[int] = Field(description="KV heads of each layer.")
    start: int = Field(description="First position shown.")
    stop: int = Field(description="End of the positions shown.")
    width: int = Field(description="Positions of a column of `held`; the last is cut.")
    held: list[list[int]] = Field(
        description="By layer and column: pairs of position and KV head still held."
    )
    bitmaps: list[str] | None = Field(
        description="With `include=bitmap`, by layer, base64: a row of bits per KV "
        "head, one per position, most significant first, padded to whole bytes."
    )
    slots: list[HeldSlots] | None = Field(description="With `include=slots`.")


class ErrorInfo(BaseModel):
    """As vLLM's."""

    message: str
    type: str
    code: int


class Error(BaseModel):
    """As vLLM answers errors."""

    error: ErrorInfo
