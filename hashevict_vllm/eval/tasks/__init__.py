"""The tasks by name; one family per module."""

from __future__ import annotations

from hashevict_vllm.eval.tasks import choice, reasoning, retrieval, summarisation
from hashevict_vllm.eval.tasks.base import Output, Sample, Task

TASKS: dict[str, Task] = {
    task.name: task
    for module in (retrieval, reasoning, choice, summarisation)
    for task in module.TASKS
}
"""Every task, in the order of the report."""

__all__ = ["TASKS", "Output", "Sample", "Task"]
