"""The list of mutations follows the code; scripts/mutations runs it, on demand."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest
from support.mutations import MUTATIONS, PACKAGE, ROOT, Mutation, apply


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_line_that_is_there(
    mutation: Mutation, tmp_path: Path
) -> None:
    source, copy = (root / PACKAGE / mutation.file for root in (ROOT, tmp_path))
    copy.parent.mkdir(parents=True)
    shutil.copy(source, copy)
    apply(mutation, tmp_path)
    before, after = (path.read_text().splitlines() for path in (source, copy))
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "-+"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert (ROOT / "tests" / mutation.tests[0]).is_file()
