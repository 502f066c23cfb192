"""ResolvedKVPolicy: a policy in plain numbers, and which tokens vote under it."""

from __future__ import annotations

from dataclasses import dataclass, replace

VOTE_HORIZON = 256
"""Steps before the cache is full from which on votes are kept."""

UNBOUNDED = 2**30
"""The budget of a request that keeps all: beyond any length, and int32 with a segment.
"""


def share_of(whole: int, percent: float) -> int:
    """A percentage of so many tokens, rounded down."""
    return int(whole * percent / 100)


def default_vote_every(budget: int) -> int:
    """``vote_every`` at a budget in tokens (docs/quality-rule.md).

    Up to 1,024 slots a token's share of the ballots is 128 slots or one ballot.
    """
    return min(8, max(1, budget // 128))


def default_value_votes(budget: int) -> float:
    """``value_votes`` at a budget in tokens (docs/quality-rule.md).

    Small budgets lose what is needed once and late, large ones what is asked for now.
    """
    return min(3.0, (320 / budget) ** 1.5)


@dataclass(frozen=True)
class ResolvedKVPolicy:
    """A policy in plain numbers, as the cache, the planner and the kernels use it.

    Attributes:
        name: Policy name.
        budget: C, live slots per (request, layer, KV head).
        scoring: Eviction rule.
        hash_bits: b, bits of a signature; unused by policies that keep none.
        hash_source: ``query`` or ``key``.
        orthogonal: Orthogonalised projection.
        sinks: Positions below this are protected.
        recent: Positions above ``t - 1 - recent`` are protected at step t; by a
            selection, `codes.RECENT_IN_SELECTION` of them at most.
        segment: S in tokens; at least ``max_model_len`` means the whole prompt.
        seed: Seed of the projection, or of the random policy.
        window: Voting queries of a segment.
        pool: Positions over which votes are max-pooled.
        value_weight: Of credit for unusual values; see `policies.value`.
        value_votes: In decode, votes of a ballot for large values; likewise.
        vote_every: In decode, one token of so many votes.
        decay: Factor on earlier votes at every vote in decode.
        recent_percent: ``recent`` as a share of the budget; None for tokens.
        allow_full: Whether a request may ask for `UNBOUNDED`.

    """

    name: str
    budget: int
    scoring: str
    hash_bits: int
    hash_source: str
    orthogonal: bool
    sinks: int
    recent: int
    segment: int
    seed: int
    window: int
    pool: int
    value_weight: float
    value_votes: float
    vote_every: int
    decay: float
    recent_percent: float | None = None
    allow_full: bool = False

    def with_budget(self, budget: int) -> ResolvedKVPolicy:
        """The same for a request with another budget; its ballots keep this pace."""
        recent = self.recent
        if self.recent_percent is not None:
            recent = share_of(budget, self.recent_percent)
        return replace(self, budget=budget, recent=recent)

    @property
    def votes(self) -> bool:
        """Whether segments are judged by votes instead of a replay."""
        return self.scoring == "vote"

    @property
    def credit(self) -> float:
        """``value_weight`` times ``window``, see `policies.value`; 0 without votes."""
        return self.value_weight * self.window if self.votes else 0.0

    @property
    def first_ballot(self) -> int:
        """Position from which on decoding tokens may vote."""
        return max(self.sinks, 1, self.budget - VOTE_HORIZON)

    def voters(self, start: int, stop: int, prompt_len: int) -> range:
        """Positions in [start, stop) whose queries vote; a matter of positions alone.

        The last ``window`` queries of a segment that will be reduced do, and those of
        the prompt, and in decode one of ``vote_every``; the latter two not while the
        cache is far from full, as votes fade before they count. Nobody votes before
        the sinks are there, in whose frame keys are described.

        Args:
            start: First position.
            stop: End; both in the prompt, with no reduction between them, or both
                beyond it.
            prompt_len: Length of the prompt.

        """
        if not self.votes:
            return range(0)
        if start >= prompt_len or self.segment == 1:
            first = max(start, self.first_ballot)
            return range(
                -(-first // self.vote_every) * self.vote_every, stop, self.vote_every
            )
        begin = (stop - 1) // self.segment * self.segment
        end = min(begin + self.segment, prompt_len)
        if end <= self.budget - (VOTE_HORIZON if end == prompt_len else 0):
            return range(0)
        return range(max(start, begin, end - self.window, self.sinks, 1), stop)
