"""A model by path or name, as vLLM's configuration; no weights are read.

vLLM itself reads ``config.json``, so that head sizes and lengths are those that it
would serve with.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashevict_vllm.sizing.presets import PRESETS
from hashevict_vllm.values import fail

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@contextmanager
def model_folder(model: str) -> Iterator[Path]:
    """The folder that holds a model's ``config.json``, while the block runs.

    Args:
        model: Such a folder, its ``config.json``, one of `PRESETS`, or a model that
            ``python -m hashevict_vllm.models`` has fetched.

    Raises:
        KVPolicyError: If it is none of them.

    """
    with ExitStack() as stack:
        if model in PRESETS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "config.json").write_text(json.dumps(PRESETS[model]))
        else:
            folder = _existing(model)
        yield folder


def _existing(model: str) -> Path:
    from hashevict_vllm.downloads import DownloadError, cache_dir

    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return path.parent
    folders = [path]
    with suppress(DownloadError):  # no home directory, so no model in it
        folders.append(cache_dir() / model)
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    near = difflib.get_close_matches(model, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"or one of {', '.join(PRESETS)}."
    raise fail("MODEL", f"{model} holds no config.json; name one that does, {hint}")


def read_config(folder: Path, **options: Any) -> VllmConfig:
    """The configuration that vLLM makes of a model, with no policy in it.

    Args:
        folder: Where its ``config.json`` lies.
        options: Further arguments of ``EngineArgs``.

    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", **options
    )
    return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def weight_bytes(folder: Path, vllm_config: VllmConfig) -> int:
    """Bytes of all weights: of the files, or counted from the configuration.

    Args:
        folder: As `read_config`.
        vllm_config: What that returned.

    """
    if files := list(folder.glob("*.safetensors")):
        return sum(file.stat().st_size for file in files)
    import torch
    from transformers import AutoModelForCausalLM

    config = vllm_config.model_config.hf_text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    return count * vllm_config.model_config.dtype.itemsize
