"""A small instruction task that can be learned in minutes: text, tokenizer and questions.

A base model reads lines such as ``#reverse d a c f = f c a d``; fine-tuning teaches it to do the
same when asked in words: ``please turn around the letters d a c f``. All is drawn from seeds.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnop"
WORDS = ("letters", "please", "the", "of", "all", "give", "me")
OPERATIONS: dict[str, tuple[Callable[[list[str]], list[str]], tuple[str, ...]]] = {
    "copy": (lambda x: x, ("please repeat the letters", "say again")),
    "reverse": (lambda x: x[::-1], ("please turn around the letters", "backwards")),
    "first": (lambda x: x[:1], ("give me the first of", "start of")),
    "last": (lambda x: x[-1:], ("give me the last of", "end of")),
    "next": (
        lambda x: [LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in x],
        ("the letters that follow", "step on"),
    ),
}
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ ' <|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' </s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of whole words to ``folder``; its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = [
        word for _, asked in OPERATIONS.values() for phrase in asked for word in phrase.split()
    ]
    words = [*SPECIAL, "=", *(f"#{name}" for name in OPERATIONS), *LETTERS, *WORDS, *phrases]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def draw(generator: random.Random, count: int) -> tuple[str, list[str], list[str]]:
    """An operation, the ``count`` letters it is applied to, and what comes out."""
    name = generator.choice(list(OPERATIONS))
    letters = generator.sample(LETTERS, count)
    return name, letters, OPERATIONS[name][0](letters)


def base_text(seed: int, letters: int) -> str:
    """A line of what the base model is trained on."""
    name, given, result = draw(random.Random(seed), letters)
    return f"<s> #{name} {' '.join(given)} = {' '.join(result)} </s>"


def write_records(
    path: Path, count: int, *, letters: int, seed: int, without: frozenset[str] = frozenset()
) -> set[str]:
    """Write ``count`` different records, with no prompt of ``without``; their prompts."""
    generator = random.Random(seed)
    records: dict[str, str] = {}
    while len(records) < count:
        name, given, result = draw(generator, letters)
        prompt = f"{generator.choice(OPERATIONS[name][1])} {' '.join(given)}"
        if prompt not in without:
            records[prompt] = " ".join(result)
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in records.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return set(records)


def read_records(path: Path) -> list[dict[str, str]]:
    """The records of `write_records`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_harness_task(folder: Path, held_out: Path, *, seed: int) -> str:
    """Write a task of lm-evaluation-harness: the right response among three wrong ones, which have
    its letters in another order, or others. Its name."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for record in read_records(held_out):
        right = record["response"]
        choices = {right}
        while len(choices) < 4:
            letters = right.split()
            generator.shuffle(letters)
            position = generator.randrange(len(letters))
            letters[position] = generator.choice(LETTERS)
            choices.add(" ".join(letters))
        shuffled = sorted(choices)
        generator.shuffle(shuffled)
        question = f"<s> <|user|> {record['prompt']} <|assistant|>"
        answer: dict[str, Any] = {"choices": shuffled, "answer": shuffled.index(right)}
        lines.append(json.dumps({"question": question, **answer}))
    data = folder / "letters.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "letters.yaml").write_text(
        "task: letters\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        "doc_to_target: answer\n"
        'doc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc}]\n",
        encoding="utf-8",
    )
    return "letters"
