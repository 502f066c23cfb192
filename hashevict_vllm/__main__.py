"""The command ``hashevict-vllm``; serving is ``vllm serve``'s business."""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    """Hand over to the subcommand."""
    parser = argparse.ArgumentParser(prog="hashevict-vllm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    add("verify", help="check the kernels on this machine", add_help=False)
    add("plan", help="what a budget buys on a machine", add_help=False)
    chosen = parser.parse_args(sys.argv[1:2]).command
    if chosen == "plan":
        from hashevict_vllm.sizing.__main__ import main as plan

        plan(sys.argv[2:])
    else:
        from hashevict_vllm.verify.__main__ import main as verify

        verify(sys.argv[2:])


if __name__ == "__main__":
    main()
