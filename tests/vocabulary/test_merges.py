"""Merges: encodings equal to the libraries' own, and growth that never lengthens a text."""

import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from transformers.convert_slow_tokenizer import generate_merges

from megatron_sat.vocabulary.merges import PairMerges, PieceMerges, grow
from megatron_sat.vocabulary.sentencepiece_file import SentencePieceFile

WORDS = ["abacus", "cab", "abba", "bacca", "accab", "cabbac", "baccabba", "abcabc", "ccaabb"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 5),
            model_writer=writer,
            model_type="bpe",
            vocab_size=30,
            hard_vocab_limit=False,
            add_dummy_prefix=False,
            minloglevel=2,
        )
    return path


def random_words(count: int, letters: str = "abc") -> list[str]:
    generator = random.Random(3)
    lengths = [generator.randint(1, 14) for _ in range(count)]
    return ["".join(generator.choices(letters, k=length)) for length in lengths]


def test_both_forms_encode_as_their_libraries(model: Path) -> None:
    file = SentencePieceFile(model)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    by_score = PieceMerges(file.scores)
    pairs = generate_merges(file.ids, file.scores)
    by_pair = PairMerges(file.ids, pairs)
    hugging_face = Tokenizer(models.BPE(vocab=file.ids, merges=pairs))
    for word in random_words(300):
        assert by_score.encode(word) == library.encode(word, out_type=str)
        assert by_pair.encode(word) == hugging_face.encode(word).tokens


def test_growth_reaches_what_is_asked_and_lengthens_nothing(model: Path) -> None:
    file = SentencePieceFile(model)
    wanted = [*random_words(60), "cab", "xyz", "bxyzb"]
    for make in (
        lambda: PieceMerges(file.scores),
        lambda: PairMerges(file.ids, generate_merges(file.ids, file.scores)),
    ):
        old, new = make(), make()
        growth = grow(new, wanted)
        assert set(growth.asked) | set(growth.present) == set(wanted)
        assert set(growth.present) <= old.pieces and not set(growth.added) & old.pieces
        assert len(set(growth.added)) == len(growth.added)
        for word in growth.asked:
            assert new.encode(word) == [word]
        shorter = 0
        for word in random_words(500, "abcx"):
            parts, before = new.encode(word), old.encode(word)
            assert "".join(parts) == word and len(parts) <= len(before)
            shorter += len(parts) < len(before)
        assert shorter > 100
