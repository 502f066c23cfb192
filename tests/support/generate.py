"""Generate in a process of its own: a JSON job on stdin, JSON tokens on stdout."""

from __future__ import annotations

import json
import sys

from support.engine import engine, greedy


def main() -> None:
    job = json.load(sys.stdin)
    with engine(job["model"], job["policy"], **job["options"]) as llm:
        tokens = greedy(llm, job["prompts"], job["tokens"])
    print(f"\n{json.dumps(tokens)}")


if __name__ == "__main__":
    main()
