"""Records of a JSONL file as what the Trainer trains on, with a count of what was left out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_sat.finetuning.chat import ChatEncoder, Message, is_response

TooLong = Literal["cut", "skip", "error"]
WithoutResponse = Literal["skip", "error"]

IGNORED = -100
"""The label of a token that is not learned, by transformers' convention."""


@dataclass
class Counts:
    """What became of a file's records."""

    records: int = 0
    """Lines that hold one."""
    used: int = 0
    without_response: int = 0
    """Left out: nothing in them to learn."""
    cut: int = 0
    """Used up to the context's length."""
    too_long: int = 0
    """Left out: longer than the context, or with responses only beyond it."""
    tokens: int = 0
    """Of those used."""
    learned: int = 0
    """Of these, tokens of responses."""
    empty: int = 0
    """The assistant's turns without text in records used: not learned."""

    def describe(self, path: str | Path) -> str:
        """One line for the log."""
        left = {
            "without a response": self.without_response,
            "longer than the context": self.too_long,
        }
        skipped = ", ".join(f"{n} {what}" for what, n in left.items() if n)
        cut = f"; {self.cut} cut to the context" if self.cut else ""
        empty = f"; {self.empty} empty responses not learned" if self.empty else ""
        return (
            f"{path}: {self.used} of {self.records} records, {self.tokens} tokens of which "
            f"{self.learned} are learned; left out: {skipped or 'none'}{cut}{empty}"
        )


class Examples:
    """Tokens and labels of records, as a data set of transformers' Trainer.

    Each is a mapping of ``input_ids`` and ``labels`` (`IGNORED` outside of responses).
    """

    def __init__(self, pairs: list[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, learned = self._pairs[index]
        labels = np.where(learned, tokens, IGNORED)
        return {"input_ids": tokens.tolist(), "labels": labels.tolist()}

    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(tokens) for tokens, _ in self._pairs]


def load_examples(
    path: Path,
    encoder: ChatEncoder,
    *,
    max_length: int,
    too_long: TooLong = "cut",
    without_response: WithoutResponse = "skip",
) -> tuple[Examples, Counts]:
    """Read a JSONL file of chats (``messages``), or of ``prompt`` and ``response``.

    Args:
        path: the file; blank lines are passed over.
        encoder: of the model's tokenizer.
        max_length: tokens that a record may have.
        too_long: what happens to longer ones. "cut" keeps their beginning, if there is something
            to learn in it.
        without_response: what happens to records in which no response has any text.

    Raises:
        ValueError: names the file, and the line where there is one: it cannot be read, a line is
            no such record, a record is refused by ``too_long`` or ``without_response``, or none is
            left.
    """
    counts, pairs = Counts(), []
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        counts.records += 1
        messages, tools = _chat(line, where)
        try:
            encoded = encoder.encode(messages, tools) if any(map(is_response, messages)) else None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if encoded is None or not any(encoded.is_response[1:]):
            if without_response == "error":
                raise ValueError(f"{where}: there is no response in it")
            counts.without_response += 1
            continue
        size = len(encoded.input_ids)
        if size > max_length and too_long == "error":
            raise ValueError(
                f"{where}: {size} tokens are more than --max_length {max_length}; valid: at most "
                "that many, or --too_long cut or skip"
            )
        tokens = np.array(encoded.input_ids[:max_length], dtype=np.int32)
        learned = np.array(encoded.is_response[:max_length], dtype=np.bool_)
        learned[:1] = False  # which nothing comes before
        if size > max_length and (too_long == "skip" or not learned.any()):
            counts.too_long += 1
            continue
        counts.cut += size > max_length
        counts.used += 1
        counts.tokens += len(tokens)
        counts.learned += int(learned.sum())
        counts.empty += sum(m["role"] == "assistant" and not is_response(m) for m in messages)
        pairs.append((tokens, learned))
    if not pairs:
        raise ValueError(f"nothing to train on is left: {counts.describe(path)}")
    return Examples(pairs), counts


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error})") from error


def _chat(line: str, where: str) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools of a record."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: is no JSON ({error})") from error
    if isinstance(record, dict):
        tools = record.get("tools") or None
        if not isinstance(tools, list | None):
            raise ValueError(f"{where}: its tools are no list")
        if isinstance(record.get("messages"), list):
            return [_message(message, where) for message in record["messages"]], tools
        prompt, response = record.get("prompt"), record.get("response")
        if isinstance(prompt, str) and isinstance(response, str | None):
            return [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response or ""},
            ], tools
    raise ValueError(
        f'{where}: is no record; valid: {{"messages": [{{"role": ..., "content": ...}}, ...]}}, or '
        '{"prompt": ..., "response": ...}'
    )


def _message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str | None):
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(isinstance(c, Mapping) for c in calls):
                raise ValueError(f"{where}: a message whose tool_calls are no list of calls")
            more = {"tool_calls": [_call(call, where) for call in calls]} if calls else {}
            return {**message, "content": content or "", **more}
    raise ValueError(f"{where}: a message without the texts role and content")


def _call(call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A call with its arguments as an object, as templates want them; OpenAI's API gives text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: arguments of a call are no JSON ({error})") from error
    return {**call, "function": {**function, "arguments": arguments}}
