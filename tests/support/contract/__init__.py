"""What hashevict-vllm relies on in vLLM, stated once, checked by reading sources.

`facts` and `server_facts`, `gpu_facts` and `xformers_facts` are the statements,
`imports` derives more from our own import lines, `sources` reads an installed vLLM or a
wheel, `checks` compares. Nothing here imports vLLM, so a wheel for another platform can
be checked.
"""

from __future__ import annotations

from .checks import check, relevant
from .facts import FACTS
from .gpu_facts import GPU_FACTS
from .imports import imported_names
from .server_facts import SERVER_FACTS
from .sources import Sources, installed, wheel
from .xformers_facts import XFORMERS_FACTS

__all__ = [
    "ALL_FACTS",
    "Sources",
    "check",
    "imported_names",
    "installed",
    "relevant",
    "wheel",
]

ALL_FACTS = (*FACTS, *SERVER_FACTS, *GPU_FACTS, *XFORMERS_FACTS)
"""Every statement, of every version."""
