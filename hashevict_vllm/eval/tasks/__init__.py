"""The tasks by name; one family per module."""

from __future__ import annotations

from hashevict_vllm.eval.tasks import (
    chats,
    choice,
    instructions,
    long_answers,
    reasoning,
    retrieval,
    summarisation,
)
from hashevict_vllm.eval.tasks.base import Output, Sample, Task

_MODULES = (
    *(retrieval, reasoning, choice, summarisation),
    *(long_answers, chats, instructions),
)
TASKS: dict[str, Task] = {
    task.name: task for module in _MODULES for task in module.TASKS
}
"""Every task, in the order of the report."""

__all__ = ["TASKS", "Output", "Sample", "Task"]
