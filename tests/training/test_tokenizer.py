"""Tokenizers: ids equal to the libraries' own, and every tokenizer that cannot serve refused."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sat.training.tokenizer import build_tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv: list[str]) -> int:",
    "    return sum(len(word) for word in argv)",
    "Größe, naïveté, 東京 and 1,234.5 units",
] * 8
TEXT = "\n".join(LINES[:4])


def _sentencepiece(folder: Path, name: str, **options: int) -> str:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / name),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return str(folder / f"{name}.model")


def _hugging_face(folder: Path, name: str, **special: str) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        ),
    )
    # As Llama's do: a plain call puts <s> in front.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)
    fast.add_tokens(["<extra>"])
    fast.save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sentencepiece_model(folder: Path) -> str:
    return _sentencepiece(folder, "pieces")


@pytest.fixture(scope="module")
def hugging_face_folder(folder: Path) -> str:
    return _hugging_face(folder, "fast", eos_token="</s>", pad_token="</s>")


def test_sentencepiece_gives_the_librarys_ids(sentencepiece_model: str) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    tokenizer = build_tokenizer("SentencePieceTokenizer", sentencepiece_model)
    assert tokenizer.tokenize(TEXT) == library.encode(TEXT)
    assert tokenizer.detokenize(library.encode(LINES[0])) == LINES[0]
    assert tokenizer.vocab_size == 360
    assert tokenizer.eod == library.piece_to_id("</s>")


def test_hugging_face_gives_the_librarys_ids_without_special_tokens(
    hugging_face_folder: str,
) -> None:
    library = tokenizers.Tokenizer.from_file(f"{hugging_face_folder}/tokenizer.json")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hugging_face_folder)
    assert library.encode(TEXT).ids[0] == library.token_to_id("<s>")
    assert tokenizer.tokenize(TEXT) == library.encode(TEXT).ids[1:]
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
    assert tokenizer.eod == library.token_to_id("</s>")
    assert tokenizer.vocab_size == library.token_to_id("<extra>") + 1


def test_null_tokenizer_reads_numbers() -> None:
    tokenizer = build_tokenizer("NullTokenizer", None, 10)
    assert tokenizer.tokenize("3 1  8") == [3, 1, 8]
    assert tokenizer.detokenize([3, 1, 8]) == "3 1 8"
    assert (tokenizer.vocab_size, tokenizer.eod) == (10, 9)
    with pytest.raises(ValueError, match="token id 10 is not in 0 to 9"):
        tokenizer.tokenize("1 10")


def test_a_vocabulary_that_holds_the_tokenizer_is_accepted(sentencepiece_model: str) -> None:
    for vocab_size in (360, 512):
        build_tokenizer("SentencePieceTokenizer", sentencepiece_model, vocab_size)
    with pytest.raises(ValueError, match=r"--vocab-size 359 .*pieces\.model.* at least 360"):
        build_tokenizer("SentencePieceTokenizer", sentencepiece_model, 359)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("SentencePieceTokenizer", None, "SentencePieceTokenizer needs --tokenizer-model"),
        ("SentencePieceTokenizer", "absent.model", r"absent\.model does not exist"),
        ("SentencePieceTokenizer", "fast", "fast is a folder"),
        ("SentencePieceTokenizer", "garbage", "garbage is not a SentencePiece model"),
        ("SentencePieceTokenizer", "endless.model", r"endless\.model has no end-of-sequence"),
        ("HuggingFaceTokenizer", "absent", "absent does not exist"),
        ("HuggingFaceTokenizer", "garbage", "garbage is a file"),
        ("HuggingFaceTokenizer", "empty", "empty is not the folder of a Hugging Face tokenizer"),
        ("HuggingFaceTokenizer", "broken", "broken/tokenizer.json is damaged"),
        ("HuggingFaceTokenizer", "endless", "endless has no end-of-sequence"),
        ("NullTokenizer", None, "NullTokenizer needs --vocab-size"),
        ("WordTokenizer", "garbage", "unknown tokenizer 'WordTokenizer'; valid are Sentence"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(
    folder: Path, hugging_face_folder: str, kind: str, model: str | None, message: str
) -> None:
    (folder / "garbage").write_bytes(b"no tokenizer" * 20)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "tokenizer.json").write_text('{"model')
    if model == "endless.model":
        _sentencepiece(folder, "endless", eos_id=-1)
    if model == "endless":
        _hugging_face(folder, "endless")
    with pytest.raises(ValueError, match=message):
        build_tokenizer(kind, None if model is None else str(folder / model))  # type: ignore[arg-type]


def test_code_in_a_tokenizer_folder_is_not_run(folder: Path) -> None:
    trap = folder / "trap"
    trap.mkdir()
    (trap / "trap.py").write_text(f"open({str(trap / 'sprung')!r}, 'w').close()\nclass Trap: pass")
    (trap / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", None]}})
    )
    with pytest.raises(ValueError, match="trap comes with Python code of its own"):
        build_tokenizer("HuggingFaceTokenizer", str(trap))
    assert not (trap / "sprung").exists()
