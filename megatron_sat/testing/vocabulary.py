"""Small Hugging Face folders whose vocabulary can be extended, and texts to do it with."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

OLD = [
    "The quick brown fox jumps over the lazy dog; the dog starts barking at 10:45.",
    "A start is not the art of starting, said the tar-smeared artist (twice).",
    "    for word in words:\n\t\tprint(word, 12345)\n",
    "Straße and naïve café",
] * 4
"""What the tokenizers are trained on."""
NEW = [
    "Η γρήγορη αλεπού πηδάει πάνω από το τεμπέλικο σκυλί και το σκυλί γαβγίζει.",
    "Η αρχή είναι το ήμισυ του παντός, και το τέλος της αλεπούς είναι η αρχή.",
    "東京の犬は東京の狐を見る。狐は犬を見ない。",
] * 4
"""What they cut into small pieces."""
MIXED = [f"{old} {new}\n{old}" for old, new in zip(OLD, NEW, strict=False)]
KINDS = ["sentencepiece and json", "sentencepiece", "json", "bytes"]
"""Of tokenizer files: those that `write_base` knows."""
ROWS = 512
"""Rows of the embedding: more than the tokenizers have tokens."""


def train_sentencepiece(path: Path, lines: list[str], size: int, **options: Any) -> Path:
    """Train a SentencePiece model of ``size`` pieces on ``lines``; returns ``path``."""
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            vocab_size=size,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            **options,
        )
    return path


def write_byte_level(folder: Path) -> None:
    """Write a byte-level tokenizer trained on `OLD`, as Llama 3's is."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        OLD, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    # Behind the vocabulary, as Llama 3's.
    fast.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    fast.save_pretrained(folder)


def write_model(folder: Path, *, tied: bool = False, **options: Any) -> None:
    """Write a Llama with one layer and random weights; ``options`` are ``save_pretrained``'s."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, **options)


def write_base(folder: Path, kind: str) -> None:
    """Write a model and a tokenizer of one of `KINDS` to the new folder ``folder``."""
    folder.mkdir()
    write_model(folder)
    if kind == "bytes":
        write_byte_level(folder)
        return
    options: dict[str, Any] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 1.0,
    }
    model = train_sentencepiece(folder / "tokenizer.model", OLD, 400, **options)
    if kind == "sentencepiece":
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return
    fast = LlamaTokenizer.from_pretrained(folder)
    if kind == "sentencepiece and json":
        fast.add_special_tokens({"pad_token": "<pad>"})  # not in tokenizer.model
    fast.save_pretrained(folder)
    if kind == "json":
        model.unlink()
