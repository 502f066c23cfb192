"""Tests that need Triton's interpreter, which is chosen before Triton is imported.

`tests/kernels/triton/test_triton_kernels.py` runs this folder in a process of its own,
so that the other tests see Triton as it is. By hand: ``TRITON_INTERPRET=1 pytest
tests/interpreted``.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

torch.set_num_threads(1)
