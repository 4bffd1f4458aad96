"""Chats as tokens, and which of them are the assistant's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, str]

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

    A response reaches from the end of its generation prompt to the token that ends its turn. A
    template says which tokens these are by ``{% generation %}``; for others they are found in the
    text.

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
        self._marked = "{% generation" in _template_text(tokenizer).replace("{%-", "{%")
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        ends = "|".join(re.escape(token) for token in {*special, *added})
        self._turn_end = re.compile(rf"\s*(?:{ends})" if ends else r"(?!)")

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The tokens of a whole chat.

        Raises:
            ValueError: the template refuses the chat, or does not show where its responses are.
        """
        text = self._write(messages)
        if self._marked:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True
            )
            return Encoded(encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]])
        spans = [
            self._span(text, messages, number)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [
            any(begin <= start and stop <= end for begin, end in spans) and stop > start
            for start, stop in encoded["offset_mapping"]
        ]
        return Encoded(encoded["input_ids"], learned)

    def _span(self, text: str, messages: Sequence[Message], number: int) -> tuple[int, int]:
        """Where in ``text`` the response of message ``number`` begins and ends."""
        prompt = self._write(messages[:number], add_generation_prompt=True)
        content = messages[number]["content"].strip()
        position = text.find(content, len(prompt)) if text.startswith(prompt) else -1
        if position < 0:
            raise ValueError(
                "the chat template does not write a chat's beginning as it writes the whole, so "
                "that responses cannot be found; mark them with {% generation %} in a template of "
                "your own"
            )
        end = position + len(content)
        turn_end = self._turn_end.match(text, end)
        if turn_end is not None:
            end = turn_end.end()
        elif number == len(messages) - 1:
            end = len(text)
        return len(prompt), end

    def _write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return text


def _template_text(tokenizer: Any) -> str:
    template = tokenizer.get_chat_template()
    return str(template)
