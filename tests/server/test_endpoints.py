"""Which routes vLLM's own app has, by the flags of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from hashevict_vllm import plugin

plugin.register()

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.entrypoints.launchers.app import build_app  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

ON = ("--kv-policy", "hashevict", "--kv-budget", "512")
INSPECT = ("--kv-policy-config.inspect", "true")
PUBLIC = {"/v1/kv_policy", "/v1/kv_policy/stats"}
INSPECTION = {
    "/v1/kv_policy/requests/{request_id}/retention",
    "/v1/kv_policy/ui",
    "/kv_policy/ui",
}


def paths(model: Path, *flags: str, tasks: tuple[str, ...] = ("generate",)) -> set[str]:
    """Our paths in the app of ``vllm serve FLAGS``."""
    try:  # moved in vLLM 0.33
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(model), *flags]
    )
    AsyncEngineArgs.from_cli_args(args)  # as run_server_worker does before
    app = build_app(args, tasks)
    return {route.path for route in app.routes if "kv_policy" in route.path}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), set()), (ON, PUBLIC), ((*ON, *INSPECT), PUBLIC | INSPECTION)],
    ids=["stock", "policy", "inspect"],
)
def test_routes_are_there_where_flags_ask_for_them(
    llama: Path, flags: tuple[str, ...], expected: set[str]
) -> None:
    assert paths(llama, *flags) == expected
    assert paths(llama, *flags) == expected, (
        "the second app of a process has them as well"
    )


def test_a_server_that_generates_nothing_has_none(llama: Path) -> None:
    assert paths(llama, *ON, *INSPECT, tasks=("embed",)) == set()
