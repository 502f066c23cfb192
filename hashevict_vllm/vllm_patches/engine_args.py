"""Patch of ``EngineArgs``: the policy's options, its dict and its refusals.

Why here: every ``vllm`` command that takes engine arguments builds them with
``EngineArgs.add_cli_args`` and ``from_cli_args``, and every engine, also from Python,
starts from ``create_engine_config`` (vllm/engine/arg_utils.py). The plugin is loaded
before each of the three is called: by ``AsyncEngineArgs.add_cli_args`` for the
parser of ``vllm serve``, which ``vllm`` builds before that of any other command with
engine arguments (vllm/entrypoints/cli/main.py), and by ``EngineArgs.__post_init__``.

Upstream fix: patches/*/engine_args.patch, ``EngineArgs.extensions``. `PolicyExtension`
is written for that hook; where vLLM has none, `apply` puts its calls in place.
"""

from __future__ import annotations

import argparse
import functools
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import cli, shared
from ..compat import rules
from ..config import ADDITIONAL_CONFIG_KEY, KVPolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

_APPLIED = "_kv_policy_patched"


class PolicyExtension:
    """The policy's part of the engine arguments."""

    def add_cli_args(self, parser: argparse.ArgumentParser) -> None:
        """Add the ``--kv-policy`` options."""
        cli.add_kv_policy_args(parser)

    def read_cli_args(self, engine_args: EngineArgs, args: argparse.Namespace) -> None:
        """Turn them into the policy dict of ``additional_config``."""
        flags = cli.kv_policy_given(args)
        if flags or _names_policy(engine_args.additional_config):
            _show_refusals_without_traceback()
        if flags:
            _store(engine_args, cli.kv_policy_from_namespace(args))
            # A spawned API server reads the namespace again before vLLM loads plugins.
            args.additional_config = engine_args.additional_config
            cli.forget_kv_policy_args(args)

    def before_engine_config(self, engine_args: EngineArgs) -> None:
        """Change the defaults that a policy cannot live with; prepare for workers."""
        if rules.policy_of(engine_args.additional_config).enabled:
            rules.default_prefix_caching_off(engine_args)
            shared.share()

    def check_engine_config(self, vllm_config: VllmConfig) -> None:
        """Refuse what the policy cannot serve."""
        rules.check(vllm_config)


def in_vllm() -> bool:
    """Whether vLLM lets plugins extend the engine arguments."""
    from vllm.engine.arg_utils import EngineArgs

    return hasattr(EngineArgs, "extensions")


def apply() -> None:
    """Extend `EngineArgs`; subclasses such as ``AsyncEngineArgs`` inherit it."""
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs, _APPLIED):
        return
    extension = PolicyExtension()
    if in_vllm():
        EngineArgs.extensions.append(extension)
    else:
        _patch(EngineArgs, extension)
    setattr(EngineArgs, _APPLIED, True)


def _patch(target: Any, extension: PolicyExtension) -> None:
    """Make the three methods call the extension, as patched vLLM would."""
    add_cli_args = target.add_cli_args
    from_cli_args = target.from_cli_args.__func__
    create_engine_config = target.create_engine_config

    @functools.wraps(add_cli_args)
    def patched_add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_cli_args(parser)
        extension.add_cli_args(parser)
        return parser

    @functools.wraps(from_cli_args)
    def patched_from(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = from_cli_args(cls, args)
        extension.read_cli_args(engine_args, args)
        return engine_args

    @functools.wraps(create_engine_config)
    def patched_create(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        extension.before_engine_config(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        extension.check_engine_config(vllm_config)
        return vllm_config

    target.add_cli_args = staticmethod(patched_add)
    target.from_cli_args = classmethod(patched_from)
    target.create_engine_config = patched_create


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
    # A copy: the dict may be a default that parsers share.
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
