"""A model whose tokens are bytes, and stand-ins for the texts of the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import add_byte_tokenizer, make_llama

from hashevict_vllm.eval import data
from hashevict_vllm.eval.tasks import retrieval


@pytest.fixture(scope="module")
def byte_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes."""
    return add_byte_tokenizer(make_llama(tmp_path_factory.mktemp("eval") / "model"))


@pytest.fixture(scope="module")
def tokenizer(byte_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(byte_llama, model_max_length=1 << 30)


@pytest.fixture(scope="module")
def sources() -> Iterator[None]:
    """Stand-ins for the source texts: the tests of tasks download nothing."""
    sentences = [f"Sentence number {i} says that it is {i}." for i in range(400)]
    documents = [f"Fact {i}: the colour of town {i} is shade {i}." for i in range(40)]
    questions = [
        data.Question(
            f"What is the colour of town {i}?",
            (f"shade {i:02}",),
            (i,),
            tuple(j for j in range(40) if j != i),
        )
        for i in range(40)
    ]
    template = {
        "template": "Read.\n{context}\nWhat about {query}?",
        "answer_prefix": " Answer:",
        "tokens_to_generate": 24,
    }
    bases = {name: template for name in _BASES}
    settings = {name: dict(_SETTINGS) for name in _CONFIGURATIONS}
    settings["niah_multikey_2"]["type_haystack"] = "needle"
    settings["niah_single_1"]["type_haystack"] = "repeat"
    items = [
        {"question": f"What is {i} and 1?", "answer": f"<<{i}+1>>It is.\n#### {i + 1}"}
        for i in range(300)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ruler_settings", lambda: (bases, settings))
        patch.setattr(data, "essays", lambda: sentences)
        patch.setattr(data, "squad", lambda: (questions, documents))
        patch.setattr(data, "hotpotqa", lambda: (questions, documents))
        patch.setattr(data, "gsm8k", lambda: items)
        patch.setattr(data, "prose", lambda: ["\n\n".join(sentences) * 3])
        patch.setattr(data, "word_list", lambda kind: [f"{kind}{i}" for i in range(99)])
        yield


_BASES = ("niah", "variable_tracking", "common_words_extraction")
_BASES += ("freq_words_extraction", "qa")
_CONFIGURATIONS = [task.name.partition("/")[2] for task in retrieval.TASKS[:13]]
_SETTINGS = {
    "type_haystack": "essay",
    "type_needle_k": "words",
    "type_needle_v": "numbers",
    "num_needle_k": 2.0,
    "num_needle_v": 1.0,
    "num_needle_q": 1.0,
    "num_chains": 1.0,
    "num_hops": 2.0,
    "num_cw": 3.0,
    "alpha": 2.0,
    "dataset": "squad",
}
