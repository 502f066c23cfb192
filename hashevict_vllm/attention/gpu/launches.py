"""What one layer launches in one step, around the stock attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from hashevict_vllm.attention.gpu.constants import DeviceConstants
from hashevict_vllm.attention.gpu.metadata import DeviceRound
from hashevict_vllm.kernels.triton import launch, ops
from hashevict_vllm.kernels.triton.arguments import Page, Step, Tokens


@dataclass(frozen=True)
class Launches:
    """The kernels of a layer's forward, round by round.

    Attributes:
        tokens: Of the step.
        page: The layer's pages.
        table: int32 [R, max blocks].
        constants: Of the KV-cache group.

    """

    tokens: Tokens
    page: Page
    table: torch.Tensor
    constants: DeviceConstants

    def sign(self) -> None:
        """Signatures and norms, for rules that compare them."""
        c = self.constants
        if c.rule.signs:
            signed = c.signed(len(self.tokens.k))
            ops.sign(self.tokens, c.projection, signed, c.rule)

    def write(self, part: DeviceRound) -> None:
        """Before attention: write tokens, evicting where the budget is full.

        In decode the votes of these tokens begin at the same time as attention.
        """
        if part.decodes:
            queries = self._kept_queries() if self.constants.rule.votes else None
            alone = dataclasses.replace(part, token_piece=None)
            self._write(alone, True, None, queries)
            if queries is not None:
                step = self._step(part.pieces, None)
                self.constants.fork.start(lambda: self._ballot(queries, step))
            return
        if part.copies:
            self._write(part, False)
            if self.constants.rule.votes:
                c, step = self.constants, self._step(part.pieces, part.token_piece)
                ops.describe(step, self.page, c.projection, c.rule)
        if part.evicting is not None:
            self._write(part, True, rows=part.evicting)

    def finish(self, part: DeviceRound) -> None:
        """After attention: votes that are not under way, and reductions."""
        c = self.constants
        if part.decodes and c.rule.votes and self._kept_queries() is None:
            self._ballot(self.tokens.q, self._step(part.pieces, None))
        if part.voting is not None:
            self._ballot(self.tokens.q, self._step(part.voting, None))
        if part.reduced is not None:
            signed, step = c.signed(len(self.tokens.k)), self._step(part.reduced, None)
            layer = (self.tokens, signed, step, self.page)
            ops.mark(*layer, c.estimate, c.rule, c.reduced_bound, part.longest)
            ops.compact(step, self.page, c.rule, c.reduced_bound)

    def load_kernels(self, part: DeviceRound) -> None:
        """Compile all that serving can reach, before a request waits for it: no-ops.

        Args:
            part: A round of the step at hand.

        """
        c, votes = self.constants, self.constants.rule.votes
        self._load_plan()
        if c.rule.signs:
            signed = c.signed(len(self.tokens.k))
            group = self.tokens.q.shape[1] // self.tokens.k.shape[1]
            for at_once in launch.sign_variants(group):
                ops.sign(self.tokens, c.projection, signed, c.rule, at_once)
        # Copies keep the alignment of what they stand for.
        nothing = torch.zeros_like(part.pieces)
        nobody = torch.full_like(c.token_piece, -1)
        host = dataclasses.replace(
            part,
            decodes=False,
            pieces=nothing[:1],
            token_piece=nobody,
            copies=True,
            evicting=c.no_prompt[:1],
            voting=nothing[:1] if votes else None,
            reduced=nothing[:1],
            longest=1,
        )
        self.write(host)
        self.finish(host)
        alone = dataclasses.replace(host, token_piece=None)
        self._write(alone, True)
        if votes:  # of a batch that is not too long for `_kept_queries`
            self._write(alone, True, None, c.queries)
            self._ballot(c.queries, self._step(nothing[:1], None))

    def _load_plan(self) -> None:
        """Plan nothing, into buffers of its own: the step at hand has a plan."""
        c, zeros = self.constants, torch.zeros_like
        none, buffers = c.no_prompt[:1], (c.done[:1], c.pieces[:1], c.live[:1])
        made_up = torch.zeros(1, dtype=torch.int64, device=none.device)
        done, pieces, live = map(zeros, buffers)
        kept = (c.budgets[:1], c.recents[:1])
        plan = (c.no_prompt[:2], none, none, *kept, done, pieces, live)
        ops.plan(*plan, zeros(c.token_piece), c.rule, True, made_up)

    def _step(self, pieces: torch.Tensor, token_piece: torch.Tensor | None) -> Step:
        return Step.of(pieces, token_piece, self.table, self.page.tail.shape[1])

    def _write(
        self,
        part: DeviceRound,
        scans: bool,
        rows: torch.Tensor | None = None,
        queries: torch.Tensor | None = None,
    ) -> None:
        c, step = self.constants, self._step(part.pieces, part.token_piece)
        layer = (self.tokens, c.signed(len(self.tokens.k)), step, self.page)
        ops.write(*layer, c.rule, scans, rows, queries)

    def _kept_queries(self) -> torch.Tensor | None:
        """Room for the queries of voters; None for batches too long for it.

        The model goes on while they are read, and its memory is used for other things.
        """
        room = self.constants.queries
        return room if len(self.tokens.q) <= len(room) else None

    def _ballot(self, queries: torch.Tensor, step: Step) -> None:
        c = self.constants
        asking = Tokens.asking(queries)
        ops.ballot(asking, step, self.page, c.estimate, c.scratch, c.rule)
