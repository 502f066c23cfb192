"""The quickstart of the documentation, as a reader types it."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

from support.pages import DOCS, ROOT, Block, blocks

SHELL = [b for b in blocks(DOCS / "quickstart.md") if b.language == "bash"]
"""Its shell blocks: the first starts the server, the others talk to it."""

CLIENTS = [b for b in blocks(DOCS / "quickstart.md")[1:] if b.language != "text"]

URL = "http://localhost:8000"
"""Where the quickstart's server listens."""


def server_command() -> list[str]:
    """The command of the first block, a script of this repository."""
    script, *options = shlex.split(SHELL[0].code)
    return [str(ROOT / script), *options]


def client_command(block: Block, url: str) -> list[str]:
    """A block for a server that listens elsewhere, as it is but for the URL."""
    assert URL in block.code
    code = block.code.replace(URL, url)
    if block.language == "python":
        return [sys.executable, "-c", code]
    return ["bash", "-o", "pipefail", "-ec", code]


def prepared_environment(directory: Path) -> Path:
    """This Python's environment, under a name that scripts take for finished.

    They would install this checkout into it otherwise, which takes minutes, and in
    somebody else's environment is none of a test's business.
    """
    for name in ("bin", "lib", "pyvenv.cfg"):
        (directory / name).symlink_to(Path(sys.prefix) / name)
    # As `prepare_extras` in scripts/lib/environment.sh.
    project = (ROOT / "pyproject.toml").read_bytes()
    stamp = hashlib.sha256(f"{ROOT}\n".encode() + project).hexdigest()
    for extra in ("cpu", "cuda", "model"):
        (directory / f".hashevict-{extra}").write_text(stamp)
    return directory
