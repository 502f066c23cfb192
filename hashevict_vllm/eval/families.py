"""What is asked per use, and how figures become means; fixed before anything was run.

A recipe names tasks, nominal length, budgets and numbers of samples for one use of a
model. Families of a report are the first part of a task's name (`Task.family`); tasks
whose question the cache does not know while it is reduced form families of their own
("query-agnostic", as kvpress's leaderboard calls them), and no mean mixes the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One use.

    Attributes:
        tasks: Names or families of tasks.
        length: Nominal length.
        budgets: Tokens or shares of the nominal length.
        samples: Per cell.
        batch: Requests at a time: as many as the engine is fastest with.

    """

    tasks: tuple[str, ...]
    length: int
    budgets: tuple[str, ...]
    samples: int
    batch: int = 8


RECIPES = {
    "reasoning": Recipe(("reasoning/chains",), 512, ("96", "128"), 40, 20),
    "accuracy": Recipe(("reasoning/solved",), 512, ("96", "128"), 150, 20),
}
"""The uses by name, for ``--family``."""
