"""Values of options as numbers within bounds, or one sentence for the user."""

from __future__ import annotations

from typing import Any

from hashevict_vllm.resolved import share_of

SHOWN = 80
"""Most characters of a value that a sentence repeats."""


class KVPolicyError(ValueError):
    """A setting that cannot be served; the message is one sentence for the user."""


def fail(flag: str, reason: str) -> KVPolicyError:
    """The error for a flag."""
    return KVPolicyError(f"{flag}: {reason}")


def shown(value: Any) -> str:
    """A user's value in a sentence: the beginning of its ``repr`` where that is long.

    Python does not print integers of more than 4,300 digits.
    """
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def as_int(flag: str, value: Any, minimum: int, maximum: int) -> int:
    """An integer, also as text from a command line, within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise fail(flag, f"expected an integer, got {shown(value)}.")
    try:
        number = int(value)
    except ValueError:
        raise fail(flag, f"expected an integer, got {shown(value)}.") from None
    if number < minimum:
        raise fail(flag, f"must be at least {minimum}, got {shown(number)}.")
    if number > maximum:
        raise fail(flag, f"must be at most {maximum}.")
    return number


def as_tokens(flag: str, value: Any, minimum: int, maximum: int) -> int | str:
    """A token count, or a share such as ``"25%"`` kept as a string."""
    if isinstance(value, str) and value.strip().endswith("%"):
        text = value.strip()
        try:
            share = float(text[:-1])
        except ValueError:
            raise fail(
                flag, f"expected tokens or a share like 25%, got {shown(value)}."
            ) from None
        if not 0 < share <= 100:
            raise fail(flag, f"a share must lie in (0%, 100%], got {text}.")
        return text
    try:
        return as_int(flag, value, minimum, maximum)
    except KVPolicyError as error:
        if isinstance(value, str) and not value.strip().lstrip("-").isdigit():
            raise fail(
                flag, f"expected tokens or a share like 25%, got {shown(value)}."
            ) from None
        raise error


def as_number(flag: str, value: Any, maximum: float, positive: bool = False) -> float:
    """A number in [0, maximum], or (0, maximum]; true is none, nor are bytes."""
    span = f"{'(' if positive else '['}0, {maximum}]"
    try:
        if isinstance(value, (bool, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise fail(flag, f"expected a number in {span}, got {shown(value)}.") from None
    if not 0 <= number <= maximum or (positive and number == 0):
        raise fail(flag, f"must lie in {span}, got {number}.")
    return number


def percent_of(value: int | str) -> float | None:
    """The share that `as_tokens` read; None where it read tokens."""
    return float(value[:-1]) if isinstance(value, str) else None


def tokens_of(value: int | str, whole: int) -> int:
    """What `as_tokens` read, in tokens."""
    return share_of(whole, float(value[:-1])) if isinstance(value, str) else value
