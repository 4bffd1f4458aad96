"""From a JSONL file to what is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_sat.finetuning.chat import DEFAULT_TEMPLATE, ChatEncoder
from megatron_sat.finetuning.packing import PackCollator, Packs, pack
from megatron_sat.finetuning.records import IGNORED, load_examples
from megatron_sat.testing.huggingface import build_model, write_tokenizer

# ChatML in this tokenizer's letters, with </s> for the end of a turn.
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>;' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ 'U' + m['content'] + 'A' }}{% endif %}"
    "{% endfor %}"
)
# Like Qwen 3's: thoughts are written for the last turn alone.
THINKING = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(think)' }}{% endif %}"
    "{{ m['content'] + '</s>;' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
# As Qwen 3's: thoughts of turns before the last question are dropped; calls of tools are written.
DROPPING = (
    "{% if tools %}{{ '<s>tools:' + tools | tojson + '</s>;' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}"
    "{% if m['role'] == 'assistant' %}{% if loop.index0 > ns.last and loop.last %}{{ '(' }}"
    "{% if ')' in m['content'] %}{{ m['content'].split(')')[0].lstrip('(') }}{% endif %}"
    "{{ ')' }}{% endif %}{{ m['content'].split(')')[-1] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function'] | tojson + '</call>' }}"
    "{% endfor %}{% else %}{{ (m['tool_call_id'] or '') + m['content'] }}{% endif %}"
    "{{ '</s>;' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
# No token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# A response changes how what stands before it is written.
UNSTABLE = (
    "{{ messages | map(attribute='content') | join | length }}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def encoder(tokenizer: Any, template: str) -> ChatEncoder:
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def learned(tokenizer: Any, template: str, chat: list[dict[str, str]]) -> list[str]:
    """The stretches of a chat that are learned."""
    tokens, mask = encoder(tokenizer, template).encode(chat)
    stretches, last = [], False
    for token, on in zip(tokens, mask, strict=True):
        if on and not last:
            stretches.append([])
        if on:
            stretches[-1].append(token)
        last = on
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["two</s>", "yes</s>"]),
        (MARKED, ["two</s>", "yes</s>"]),
        (THINKING, ["two</s>", "(think)yes</s>"]),
        (DROPPING, ["two</s>", "()yes</s>"]),
        (PLAIN, ["two;", "yes;"]),
        (DEFAULT_TEMPLATE, ["two</s>", "yes</s>"]),
    ],
)
def test_all_responses_of_a_chat_are_learned_and_nothing_else(
    tokenizer: Any, template: str, expected: list[str]
) -> None:
    assert learned(tokenizer, template, CHAT) == expected
    assert learned(tokenizer, template, CHAT[:3]) == [expected[0]]


def test_a_response_ends_before_the_next_turn(tokenizer: Any) -> None:
    """Where the template writes it otherwise than it is given, and others repeat it."""
    thought = {"role": "assistant", "content": "(1+1 is 2)two"}
    chat = [CHAT[0], thought, {"role": "user", "content": "(1+1 is 2)two"}, CHAT[3]]
    assert learned(tokenizer, DROPPING, chat) == ["two</s>", "()yes</s>"]
    assert learned(tokenizer, DROPPING, chat[:2]) == ["(1+1 is 2)two</s>"]
    chat[2] = {"role": "user", "content": "why"}
    assert learned(tokenizer, DROPPING, chat) == ["two</s>", "()yes</s>"]
    chat[3] = thought
    assert learned(tokenizer, DROPPING, chat) == ["two</s>", "(1+1 is 2)two</s>"]


WITH_MARKED_CALLS = MARKED.replace(
    "{{ eos_token }}", "{{ (m['tool_calls'] or '') | string + eos_token }}"
)
CALL = {"id": "x", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("template", [DROPPING, WITH_MARKED_CALLS])
def test_calls_of_tools_are_learned(tmp_path: Path, tokenizer: Any, template: str) -> None:
    """With OpenAI's form of their arguments, as text, and no content."""
    as_text = {"name": "add", "arguments": '{"a": 1}'}
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": as_text}]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "yes"},
    ]
    as_object = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    path = write(tmp_path / "data.jsonl", {"messages": chat, "tools": [CALL]})
    chats = encoder(tokenizer, template + "{{ tools | length if tools }}")
    examples, counts = load_examples(path, chats, max_length=1000)
    (example,) = examples
    (alone,) = learned(tokenizer, chats._tokenizer.chat_template, [chat[0], as_object])
    text = tokenizer.decode([t for t in example["labels"] if t != IGNORED])
    first, two, yes = text.replace("()", "").split("</s>")[:3]
    assert (two, yes) == ("two", "yes")
    assert alone.replace("()", "") == first + "</s>"
    if template == DROPPING:
        assert first == '<call>{"name":Ġ"add",Ġ"arguments":Ġ{"a":Ġ1}}</call>'.replace("Ġ", " ")
        whole = tokenizer.decode(example["input_ids"])
        assert whole.startswith('<s>tools:[{"id": "x"') and "<s>tool:x2</s>" in whole
    else:
        assert "'arguments': {'a': 1}" in first
    assert counts.empty == 0 and counts.learned == len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("template", [CHATML, MARKED, DEFAULT_TEMPLATE])
def test_tools_that_a_template_does_not_write_are_refused(
    tmp_path: Path, tokenizer: Any, template: str
) -> None:
    chats = encoder(tokenizer, template)
    with pytest.raises(ValueError, match="it has tools, which the chat template does not write"):
        chats.encode(CHAT, [CALL])
    called = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    path = write(tmp_path / "data.jsonl", {"messages": called})
    with pytest.raises(ValueError, match="line 1: it has tool_calls, which the chat template"):
        load_examples(path, chats, max_length=100)


@pytest.mark.parametrize("template", [CHATML, MARKED, DROPPING])
def test_turns_without_a_response_are_not_learned(
    tmp_path: Path, tokenizer: Any, template: str
) -> None:
    empty = {"role": "assistant", "content": None, "tool_calls": []}
    chat = [CHAT[0], empty, {"role": "user", "content": "go"}, CHAT[1]]
    path = write(tmp_path / "data.jsonl", {"messages": chat}, {"messages": [CHAT[0], empty]})
    examples, counts = load_examples(path, encoder(tokenizer, template), max_length=100)
    (example,) = examples
    text = tokenizer.decode([t for t in example["labels"] if t != IGNORED])
    assert text.removeprefix("()") == "two</s>"
    assert (counts.empty, counts.used, counts.without_response) == (1, 1, 1)
    assert "1 empty responses not learned" in counts.describe(path)


def test_records_of_which_nothing_is_learned_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    """A template that marks some responses only."""
    some = MARKED.replace("== 'assistant'", "== 'assistant' and 'w' in m['content']")
    path = write(tmp_path / "data.jsonl", {"messages": CHAT[2:]}, {"messages": CHAT[:2]})
    examples, counts = load_examples(path, encoder(tokenizer, some), max_length=100)
    assert (len(examples), counts.used, counts.without_response) == (1, 1, 1)
    path = write(tmp_path / "data.jsonl", {"messages": CHAT[2:]})
    with pytest.raises(ValueError, match="nothing to train on is left"):
        load_examples(path, encoder(tokenizer, some), max_length=100)


def test_a_template_in_which_responses_cannot_be_found_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"mark them with \{% generation %\}"):
        encoder(tokenizer, UNSTABLE).encode([CHAT[0], {**CHAT[1], "content": "three"}, *CHAT[2:]])
    refusing = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="the chat template refuses it: no system"):
        encoder(tokenizer, refusing).encode(CHAT)
    with pytest.raises(ValueError, match="has no chat template"):
        encoder(tokenizer, "")


def write(path: Path, *records: Any) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_records_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"messages": CHAT},
        "",
        {"prompt": "1+1", "response": "two", "more": 3},
        {"prompt": "1+1"},
        {"prompt": "1+1", "response": " "},
        {"messages": CHAT[:1]},
        {"prompt": "x" * 40, "response": "y"},
        {"prompt": "x", "response": "y" * 60},
    )
    chatml = encoder(tokenizer, CHATML)
    whole, counts = load_examples(path, chatml, max_length=200)
    assert (counts.records, counts.used, counts.without_response) == (7, 4, 3)
    assert (counts.cut, counts.too_long) == (0, 0)
    assert counts.tokens == sum(whole.lengths())
    learned = [[t for t in example["labels"] if t != IGNORED] for example in whole]
    assert counts.learned == sum(map(len, learned))
    assert tokenizer.decode(learned[1]) == "two</s>"
    assert all(
        label in (IGNORED, token)
        for example in whole
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    )
    # In this tokenizer each letter is a token. Of the last two, the first has its response beyond
    # 44 tokens and the second loses most of it.
    cut, counts = load_examples(path, chatml, max_length=44)
    assert (counts.used, counts.cut, counts.too_long) == (3, 2, 1)
    assert max(cut.lengths()) == 44
    assert cut[2]["input_ids"] == whole[3]["input_ids"][:44]
    short, counts = load_examples(path, chatml, max_length=44, too_long="skip")
    assert counts.cut == 0 and counts.too_long + counts.used == 4
    assert max(short.lengths()) <= 44
    assert "left out: 3 without a response" in counts.describe(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is no JSON"),
        ('{"text": "a"}', "line 2: is no record; valid:"),
        ('["a"]', "line 2: is no record; valid:"),
        ('{"prompt": "a", "response": 3}', "line 2: is no record; valid:"),
        ('{"messages": [{"role": "user"}, 3]}', "line 2: a message without the texts role and"),
        ('{"messages": [{"content": "a"}]}', "line 2: a message without the texts role and"),
        ('{"messages": [], "tools": "a"}', "line 2: its tools are no list"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": 3}]}',
            "line 2: a message whose tool_c",
        ),
        (
            '{"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "x"}}]}]}',
            "line 2: arguments of a call are no JSON",
        ),
    ],
)
def test_a_line_that_is_no_record_is_an_error(
    tmp_path: Path, tokenizer: Any, line: str, message: str
) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "response": "b"}, line)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(path, encoder(tokenizer, CHATML), max_length=100)
    assert str(error.value).startswith(str(path))


def test_errors_where_records_are_not_to_be_left_out(tmp_path: Path, tokenizer: Any) -> None:
    chatml = encoder(tokenizer, CHATML)
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a"})
    with pytest.raises(ValueError, match="line 2: there is no response in it"):
        load_examples(path, chatml, max_length=100, without_response="error")
    path = write(tmp_path / "data.jsonl", {"prompt": "a", "response": "b" * 90})
    with pytest.raises(ValueError, match=r"line 1: \d+ tokens are more than --max_length 50"):
        load_examples(path, chatml, max_length=50, too_long="error")
    path = write(tmp_path / "data.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match=r"nothing to train on is left: .*0 of 1 records"):
        load_examples(path, chatml, max_length=50)
    with pytest.raises(ValueError, match=r"absent\.jsonl: cannot be read"):
        load_examples(tmp_path / "absent.jsonl", chatml, max_length=50)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: is not UTF-8"):
        load_examples(path, chatml, max_length=50)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
@settings(deadline=None)
def test_packs_hold_every_record_once(lengths: list[int], capacity: int) -> None:
    packs = pack(lengths, capacity)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in members) for members in packs]
    assert all(size <= capacity for size in sizes)
    # Best fit: no two packs could be one.
    assert all(a + b > capacity for i, a in enumerate(sizes) for b in sizes[:i])


def test_a_pack_is_its_records_one_by_one(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "a" * n, "response": "b" * n} for n in (9, 2, 5, 1)]
    path = write(tmp_path / "data.jsonl", *records)
    examples, _ = load_examples(path, encoder(tokenizer, CHATML), max_length=100)
    packs = Packs(examples, 100)
    assert len(packs) < len(examples)
    batch = PackCollator(lengths=False)([packs[index] for index in range(len(packs))])
    assert batch["input_ids"].shape == (1, sum(examples.lengths()))
    model = build_model("llama3").eval()
    together = model(**batch, use_cache=False).loss * (batch["labels"] != IGNORED).sum()
    alone = torch.zeros(())
    for example in examples:
        labels = torch.tensor([example["labels"]])
        loss = model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss
        alone = alone + loss * (labels != IGNORED).sum()
    torch.testing.assert_close(together, alone)
    with_lengths = PackCollator(lengths=True)([packs[0]])
    ends = with_lengths["cu_seq_lens_q"].tolist()
    assert ends[0] == 0 and ends[-1] == with_lengths["input_ids"].shape[1]
