"""What is asked per use, and how figures become means; fixed before anything was run.

A recipe names tasks, nominal length, budgets and numbers of samples for one use of a
model. Families of a report are the first part of a task's name (`Task.family`); tasks
whose question the cache does not know while it is reduced form families of their own
("query-agnostic", as kvpress's leaderboard calls them), and no mean mixes the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from hashevict_vllm.eval.tasks import retrieval
from hashevict_vllm.eval.tasks.base import LATE


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


_NEEDLES = ("retrieval/niah_single_2", "retrieval/niah_multikey_1")
_SHARES = ("10%", "30%", "50%", "70%")
RECIPES = {
    "reasoning": Recipe(("reasoning/chains",), 512, ("96", "128"), 40, 20),
    "accuracy": Recipe(("reasoning/solved",), 512, ("96", "128"), 150, 20),
    "long_answers": Recipe(("long_answers",), 2048, ("25%",), 12, 12),
    "retrieval": Recipe((*_NEEDLES, "retrieval/qa_1"), 1024, _SHARES, 50),
    "question_unknown": Recipe(
        (
            *(f"{name}_late" for name in _NEEDLES),
            *("retrieval/qa_1_late", "choice/squad_late"),
        ),
        1024,
        ("30%", "50%"),
        50,
    ),
    "chats": Recipe(("chats",), 1024, ("30%", "50%"), 30),
    "instructions": Recipe(("instructions",), 1024, ("30%", "50%"), 30),
    "choice": Recipe(("choice/squad",), 1024, _SHARES, 60),
    "summaries": Recipe(("summarisation/own",), 1024, _SHARES, 20),
    "prose": Recipe(("summarisation/prose",), 1024, ("30%", "50%"), 20),
    "ruler": Recipe(
        tuple(task.name for task in retrieval.TASKS if not task.name.endswith(LATE)),
        4096,
        ("12.5%", "25%", "50%", "75%"),
        20,
    ),
}
"""The uses by name, for ``--family``."""
