"""Chats as tokens, and which of them are the assistant's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]
"""The texts ``role`` and ``content``, and what else a template may know of, as ``tool_calls``."""

# A response that no chat has.
_MARK = "\ue000\ue001\ue000"

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""For tokenizers without a chat template: roles in plain text, as Tulu has them, and the
end-of-sequence token after each response."""


class Encoded(NamedTuple):
    """A chat as tokens."""

    input_ids: list[int]
    is_response: list[bool]
    """Of each token: the model is to learn it."""


class ChatEncoder:
    """Writes chats by a tokenizer's template.

    A response reaches from the end of its generation prompt to the token that ends its turn, calls
    of tools included; one without text or calls is not learned. A template says which tokens these
    are by ``{% generation %}``; for others they are found in the text.

    Args:
        tokenizer: of transformers, with a chat template.

    Raises:
        ValueError: the tokenizer has no template, or cannot say where in the text its tokens are.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say where in the text its tokens are; give "
                "a model folder with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        ends = "|".join(re.escape(token) for token in {*special, *added})
        self._turn_end = re.compile(rf"\s*(?:{ends})" if ends else r"(?!)")

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Encoded:
        """The tokens of a whole chat. ``tools``: those it may call, for the template to describe.

        Raises:
            ValueError: the template refuses the chat, does not write its tools or calls of them,
                or does not show where its responses are.
        """
        template = str(self._tokenizer.get_chat_template(tools=tools))
        _check_tools(template, messages, tools)
        marked = "{% generation" in template.replace("{%-", "{%")
        text = self._write(messages, tools)
        # Where a template marks turns it marks empty ones as well, which are not to be learned.
        spans = [
            self._span(text, messages, tools, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and is_response(message) != marked
        ]
        if not marked:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            learned = [_inside(token, spans) for token in encoded["offset_mapping"]]
            return Encoded(encoded["input_ids"], learned)
        encoded = self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        tokens = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
        learned = [bool(on) and not _inside(token, spans) for on, token in tokens]
        return Encoded(encoded["input_ids"], learned)

    def _span(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, number: int
    ) -> tuple[int, int]:
        """Where in ``text`` the response of message ``number`` begins and ends."""
        prompt = self._write(messages[:number], tools, add_generation_prompt=True)
        so_far = self._write(messages[: number + 1], tools)
        if so_far.startswith(prompt) and text.startswith(so_far):
            # What stands behind the token that ends the turn is the template's.
            content = messages[number]["content"].strip()
            found = so_far.rfind(content, len(prompt)) if content else -1
            said = len(prompt) if found < 0 else found + len(content)
            ends = list(self._turn_end.finditer(so_far, said))
            return len(prompt), ends[-1].end() if ends else len(so_far)
        # Later turns change how this one is written, as Qwen3 drops the thoughts of old ones: it
        # is what gives way to another response in the same place.
        others = [*messages[:number], {"role": "assistant", "content": _MARK}]
        before, _, after = self._write([*others, *messages[number + 1 :]], tools).partition(_MARK)
        begin, end = len(before), len(text) - len(after)
        if begin > end or not (text.startswith(before) and text.endswith(after)):
            raise ValueError(
                "the chat template does not write the rest of a chat alike whatever a response "
                "is, so that responses cannot be found; mark them with {% generation %} in a "
                "template of your own"
            )
        turn_end = self._turn_end.match(text, end)
        return begin, end if turn_end is None else turn_end.end()

    def _write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return text


def is_response(message: Message) -> bool:
    """Whether a message is the assistant's, with text or calls of tools in it."""
    said = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said)


def _check_tools(template: str, messages: Sequence[Message], tools: Any) -> None:
    """ValueError for what a template would leave out without a word."""
    calls = any(message.get("tool_calls") for message in messages)
    for name, given in (("tools", tools), ("tool_calls", calls)):
        if given and not re.search(rf"\b{name}\b", template):
            raise ValueError(
                f"it has {name}, which the chat template does not write; give a --chat_template "
                "that does"
            )


def _inside(token: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    start, stop = token
    return stop > start and any(begin <= start and stop <= end for begin, end in spans)
