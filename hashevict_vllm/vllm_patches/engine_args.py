"""Patch of ``EngineArgs``: the policy's options, its dict and its refusals.

Why here: every ``vllm`` command that takes engine arguments builds them with
``EngineArgs.add_cli_args`` and ``from_cli_args``, and every engine, also from Python,
starts from ``create_engine_config`` (vllm/engine/arg_utils.py). The plugin is loaded
before each of the three is called: by ``AsyncEngineArgs.add_cli_args`` for the
parser of ``vllm serve``, which ``vllm`` builds before that of any other command with
engine arguments (vllm/entrypoints/cli/main.py), and by ``EngineArgs.__post_init__``.

Upstream fix: a hook with which a general plugin adds an argument group whose values
go to ``additional_config``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import cli, compat
from ..config import ADDITIONAL_CONFIG_KEY, KVPolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_APPLIED = "_kv_policy_patched"


def apply() -> None:
    """Patch the three methods; subclasses such as ``AsyncEngineArgs`` inherit them."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, _APPLIED):
        return
    patches: dict[str, Any] = {
        "add_cli_args": staticmethod(_add_cli_args(EngineArgs.add_cli_args)),
        "from_cli_args": classmethod(_from_cli_args(EngineArgs.from_cli_args.__func__)),
        "create_engine_config": _create_engine_config(EngineArgs.create_engine_config),
        _APPLIED: True,
    }
    for name, value in patches.items():
        setattr(EngineArgs, name, value)


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return cli.add_kv_policy_args(original(parser))

    return add_cli_args


def _from_cli_args(original: Callable[..., EngineArgs]) -> Callable[..., EngineArgs]:
    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = original(cls, args)
        flags = cli.kv_policy_given(args)
        if flags or _names_policy(engine_args.additional_config):
            _show_refusals_without_traceback()
        if flags:
            _store(engine_args, cli.kv_policy_from_namespace(args))
        return engine_args

    return from_cli_args


def _create_engine_config(
    original: Callable[..., VllmConfig],
) -> Callable[..., VllmConfig]:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if not compat.policy_of(self.additional_config).enabled:
            return original(self, *args, **kwargs)
        compat.default_prefix_caching_off(self)
        vllm_config = original(self, *args, **kwargs)
        compat.check(vllm_config)
        return vllm_config

    return create_engine_config


def _names_policy(additional_config: Any) -> bool:
    return (
        isinstance(additional_config, dict)
        and ADDITIONAL_CONFIG_KEY in additional_config
    )


def _store(engine_args: EngineArgs, policy: dict[str, Any] | None) -> None:
    """Put the policy dict where every process of the engine will find it.

    Raises:
        KVPolicyError: When ``additional_config`` holds a policy already, or is an
            object of another plugin that takes no keys.

    """
    additional = engine_args.additional_config
    if _names_policy(additional):
        raise KVPolicyError(
            f"--additional-config: holds {ADDITIONAL_CONFIG_KEY!r} while --kv-policy "
            "options are given as well; keep one of the two."
        )
    if policy is None:
        return
    if not isinstance(additional, dict):
        raise KVPolicyError(
            f"--additional-config: must be a JSON object to hold the policy of "
            f"--kv-policy, got {additional!r}."
        )
    # A copy: the dict belongs to the namespace, which vLLM may read again.
    engine_args.additional_config = {**additional, ADDITIONAL_CONFIG_KEY: policy}


def _show_refusals_without_traceback() -> None:
    """End this command-line process with the sentence of an uncaught `KVPolicyError`.

    The refusal may rise through an event loop and vLLM's context managers. It stays an
    exception on that way, so that they can clean up; only its display is changed.
    """
    previous = sys.excepthook
    if getattr(previous, _APPLIED, False):
        return

    def excepthook(
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, KVPolicyError):
            print(f"vllm: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    setattr(excepthook, _APPLIED, True)
    sys.excepthook = excepthook
