"""The grid of cells, and what results are filed by."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval import grid, rule_digest


def test_policies_are_read_from_names_pairs_and_json() -> None:
    assert grid.parse_policy("paper").options["preset"] == "paper"
    held = grid.parse_policy("hashevict:segment=prompt,hash_bits=32")
    assert held.options == {"name": "hashevict", "segment": "prompt", "hash_bits": 32}
    named = grid.parse_policy('{"name": "hashevict", "label": "ours"}', "segment=64")
    assert (named.label, named.options["segment"]) == ("ours segment=64", 64)
    assert grid.parse_policy("full", "segment=64").options == {"name": "full"}
    with pytest.raises(KVPolicyError, match="did you mean 'hash_bits'"):
        grid.parse_policy("hashevict:hash_bit=32")
    for name in grid.default_policies():
        grid.parse_policy(name)


def test_equal_budgets_share_an_engine_and_the_full_cache_comes_first() -> None:
    policies = [grid.parse_policy("hashevict"), grid.parse_policy("full")]
    engines = grid.cells(policies, ["50%", "512", "2000"], ["t"], [1024, 2048])
    found = [(p.label, b, [c.length for c in cells]) for p, b, cells in engines]
    assert found == [
        ("full", None, [1024, 2048]),
        ("hashevict", 512, [1024, 2048]),
        ("hashevict", 1024, [2048]),
        ("hashevict", 2000, [2048]),
    ]


def test_results_are_filed_by_the_source_of_their_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policies = ("hashevict", "paper", "streaming_llm")
    options = {name: grid.parse_policy(name).resolved(256) for name in policies}

    original = rule_digest.PACKAGE

    def digests(change: str = "", file: str = "policies/vote.py") -> list[str | None]:
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(original, copy)
        source = copy / file
        source.write_text(source.read_text() + change)
        monkeypatch.setattr(rule_digest, "PACKAGE", copy)
        rule_digest._digest.cache_clear()
        return [rule_digest.rule_digest(options[name]) for name in policies]

    vote, paper, streaming = digests()
    assert len({vote, paper, streaming}) == 3
    assert digests("# a comment\n") == [vote, paper, streaming]
    changed = digests("MORE = 1\n")
    assert changed[0] != vote
    assert changed[1:] == [paper, streaming]
    assert digests("MORE = 1\n", "kernels/cpu/evict.py")[0] not in (vote, changed[0])
    assert digests("MORE = 1\n", "policies/hashevict.py")[::2] == [vote, streaming]
    assert rule_digest.rule_digest({"name": "full"}) is None
    rule_digest._digest.cache_clear()
