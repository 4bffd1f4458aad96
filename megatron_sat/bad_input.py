"""What the refusals of bad input share: JSON whose every fault is a ValueError, and reasons that
fit into one line."""

import json
from typing import Any

_LONGEST_REASON = 300


def parse_json(text: str | bytes, *, strict: bool = False) -> Any:
    """What JSON holds.

    With `strict`, for files that people write: a key that stands twice in an object, and numbers
    that are not finite, are errors as well.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python reads.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"object_pairs_hook": _unique, "parse_constant": _finite}
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice in one object")
    return result


def _finite(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def reason(error: BaseException) -> str:
    """What another library's exception says, in one line of at most 300 characters."""
    return shorten(one_line(error) or type(error).__name__)


def one_line(message: object) -> str:
    """A message as it is shown. A value that it quotes may have line ends."""
    return " ".join(str(message).split())


def shorten(value: object) -> str:
    """A value for a message: at most 300 characters of it."""
    text = str(value)
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 4] + " ..."
