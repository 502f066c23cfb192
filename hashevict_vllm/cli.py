"""Command-line options of a KV policy, and the policy dict they stand for.

Nothing here has a side effect: `vllm_patches.engine_args` hangs these functions into
vLLM's own parser. All three options take part in ``vllm serve --config file.yaml``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from typing import Any

from .config import POLICY_NAMES, KVPolicyConfig, KVPolicyError, option_flag

GROUP_TITLE = "KVPolicyConfig"
"""Heading in ``--help`` and search word of ``vllm serve --help=KVPolicyConfig``."""

OFF = POLICY_NAMES[0]
OWN_FLAG = ("name", "budget")
"""Keys that are no keys of ``--kv-policy-config``."""

_DESTS = ("kv_policy", "kv_budget", "kv_policy_config")


def add_kv_policy_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the policy's argument group to a parser of engine arguments.

    All defaults are ``None``, so that a flag that was given can be told from one that
    was not, and so that ``vllm serve`` logs what was given.
    """
    group = parser.add_argument_group(
        title=GROUP_TITLE,
        description="A fixed KV-cache budget per request (hashevict-vllm).",
    )
    group.add_argument(
        "--kv-policy",
        choices=POLICY_NAMES,
        help=f"How the KV cache is bounded; stock vLLM if not given or {OFF}.",
    )
    group.add_argument(
        "--kv-budget",
        type=_parse_budget,
        metavar="N|P%",
        help="Tokens kept per request and KV head, or a share of max_model_len such "
        f"as 25%%. Required with a policy other than {OFF}.",
    )
    group.add_argument(
        "--kv-policy-config",
        type=_parse_options,
        action=_MergeOptions,
        metavar="JSON",
        help=_options_help(),
    )
    return parser


def kv_policy_given(args: argparse.Namespace) -> bool:
    """Whether any option of the group was on the command line or in its YAML file."""
    return any(getattr(args, dest, None) is not None for dest in _DESTS)


def forget_kv_policy_args(args: argparse.Namespace) -> None:
    """Mark the options as read, once ``additional_config`` holds what they say."""
    for dest in _DESTS:
        setattr(args, dest, None)


def kv_policy_from_namespace(args: argparse.Namespace) -> dict[str, Any] | None:
    """Merge the three options into the policy dict of ``additional_config``.

    Returns:
        The dict, or ``None`` where the namespace asks for stock vLLM.

    Raises:
        KVPolicyError: When a policy's options come without a policy, when JSON holds
            a key that has its own flag, or as `KVPolicyConfig.from_dict`.

    """
    name = getattr(args, "kv_policy", None)
    budget = getattr(args, "kv_budget", None)
    options = dict(getattr(args, "kv_policy_config", None) or {})
    for key in OWN_FLAG:
        if key in options:
            raise KVPolicyError(
                f"--kv-policy-config: {key!r} has its own flag, {option_flag(key)}."
            )
    if budget is not None:
        options = {"budget": budget, **options}
    if name is None or name == OFF:
        if options:
            raise _without_policy(next(iter(options)), name)
        return None
    policy = {"name": name, **options}
    KVPolicyConfig.from_dict(policy)
    return policy


def _without_policy(key: str, name: str | None) -> KVPolicyError:
    flag = option_flag(key)
    add = "--kv-policy hashevict"
    if name is None:
        return KVPolicyError(
            f"{flag}: needs a policy that bounds the cache; add {add}."
        )
    return KVPolicyError(
        f"{flag}: has no meaning with --kv-policy {name}, which is stock vLLM; "
        f"use {add} or drop it."
    )


class _MergeOptions(argparse.Action):
    """Later keys win over earlier ones; the option itself may be repeated.

    FlexibleArgumentParser (vllm/utils/argparse_utils.py) hands over a YAML file's
    map, a JSON string and the dotted form as separate occurrences of the option.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, {**earlier, **values})


def _parse_budget(text: str) -> int | str:
    """Read ``1024``, ``1k`` or ``25%``; what is none of these is left to the config."""
    from vllm.utils.argparse_utils import human_readable_int

    try:
        return human_readable_int(text)
    except ValueError:
        return text


def _parse_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(
            f"expected a JSON object such as '{{\"hash_bits\": 64}}', got {text!r}."
        )
    return options


def _options_help() -> str:
    lines = [
        "Further options as JSON, or one by one: --kv-policy-config.hash_bits 64. "
        "If given more than once, later keys win. Keys:\n"
    ]
    meanings = attribute_docs()
    for field in dataclasses.fields(KVPolicyConfig):
        if field.name not in OWN_FLAG:
            default = json.dumps(field.default)
            meaning = meanings.get(field.name, "")
            lines.append(f"- {field.name}: {meaning} (default: {default})")
    return "\n".join(lines).replace("%", "%%")


def attribute_docs() -> dict[str, str]:
    """Meaning of each key, from the ``Attributes`` of `KVPolicyConfig`'s docstring."""
    _, _, section = (inspect.getdoc(KVPolicyConfig) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.replace("`", "").split()) for name, text in entries}
