"""What we rely on in vLLM: an upgrade fails here, in one readable place.

The statements are in tests/support/contract; ``scripts/check-vllm VERSION`` compares
them with the sources of a release that is not installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.contract import ALL_FACTS, Sources, check, imported_names, installed
from support.contract.checks import Fact, relevant
from support.patched_vllm import PATCHES

import hashevict_vllm

VLLM = installed()
PACKAGE = Path(hashevict_vllm.__file__).parent


def name_of(fact: Fact) -> str:
    return f"{fact.at} ({fact.why})"


@pytest.mark.parametrize("fact", relevant(ALL_FACTS, VLLM.version), ids=name_of)
def test_vllm_is_as_we_rely_on(fact: Fact) -> None:
    assert check(fact, VLLM) is None


@pytest.mark.parametrize("fact", imported_names(PACKAGE, VLLM), ids=name_of)
def test_what_we_import_is_there(fact: Fact) -> None:
    assert check(fact, VLLM) is None


def test_the_installed_vllm_is_a_supported_one_and_has_diffs() -> None:
    import vllm

    from hashevict_vllm.compat.rules import is_supported_vllm

    assert is_supported_vllm(vllm.__version__)
    assert (PATCHES / f"vllm-{VLLM.version}").is_dir()


# -- the checks themselves -------------------------------------------------------

CODE = """
if True:
    from vllm.elsewhere import helper
class Host:
    limit: int = 1
    def __init__(self, a, *, b=None, **kwargs):
        self.size = a  # self.other
    def run(self):
        first(); second()
"""
HOST = Sources("9.9.0+cpu", {"vllm/host.py": CODE}.get)


@pytest.mark.parametrize(
    "fact",
    [
        Fact("vllm/host.py", "", has=("helper", "Host")),
        Fact("vllm/host.py:Host", "", has=("limit", "size", "run")),
        Fact("vllm/host.py:Host.__init__", "", takes=("self", "a", "b", "**kwargs")),
        Fact("vllm/host.py:Host.run", "", says=("first()", "second()")),
    ],
)
def test_a_true_statement_raises_no_objection(fact: Fact) -> None:
    assert check(fact, HOST) is None


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        (Fact("vllm/gone.py", "we need it"), "the file is gone; we need it."),
        (Fact("vllm/host.py:Host.stop", "we call it"), "it is gone; we call it."),
        (
            Fact("vllm/host.py:Host", "we read it", has=("limit", "other")),
            "no longer has other; we read it.",
        ),
        (
            Fact("vllm/host.py:Host.run", "we call it", takes=("self", "x")),
            "takes (self) instead of (self, x); we call it.",
        ),
        (
            Fact("vllm/host.py:Host.run", "order counts", says=("second()", "first()")),
            "no longer says `first()` (in this order); order counts.",
        ),
    ],
)
def test_a_broken_statement_becomes_one_sentence(fact: Fact, sentence: str) -> None:
    assert check(fact, HOST) == f"vLLM 9.9.0, {fact.at}: {sentence}"


def test_statements_about_another_version_are_left_out() -> None:
    facts = [Fact("a", "", only="9.9"), Fact("b", "", only="9.8"), Fact("c", "")]
    assert [fact.at for fact in relevant(facts, HOST.version)] == ["a", "c"]
