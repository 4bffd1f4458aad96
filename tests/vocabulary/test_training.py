"""From an extended folder through training of its rows to a folder again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import train_on_ranks, write_indexed_data
from megatron_sat.vocabulary import extend_vocabulary

PIECES = [f"▁{word}{end}" for word in ["ab", "cd", "ef", "gh", "ij"] for end in "klmnopqrs"]


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_pieces_train_alone_and_padding_is_not_exported(
    tmp_path: Path, tied: bool
) -> None:
    base, extended, trained = (tmp_path / name for name in ("base", "extended", "trained"))
    write_tokenizer(write_model(base, "qwen3-tied" if tied else "llama2"))
    (tmp_path / "list.txt").write_text("\n".join(PIECES))
    report = extend_vocabulary(
        base=str(base), pieces=str(tmp_path / "list.txt"), output=str(extended)
    )
    assert len(report.growth.asked) == len(PIECES) and report.vocab_size > 131
    data = write_indexed_data(tmp_path / "numbers")
    train_on_ranks(
        f"--load-hf {extended} --save-hf {trained} --save {tmp_path / 'run'} "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {extended} --num-workers 0 "
        f"--train-data-path {data} --seq-length 32 --micro-batch-size 4 --train-iters 3 --lr 0.01 "
        "--eval-iters 0 --tensor-model-parallel-size 2 --zero-stage 3 "
        "--make-vocab-size-divisible-by 64 --train-only word_embeddings|output_layer".split(),
        2,
    )
    before, after = (load_file(path / "model.safetensors") for path in (extended, trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert all(after[name].shape == before[name].shape for name in before)
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config.vocab_size == report.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.tokenize(" abk ghp") == ["Ġabk", "Ġghp"]
    # All rows of the output had a gradient, the new ones included.
    rows = "model.embed_tokens.weight" if tied else "lm_head.weight"
    moved = (before[rows] != after[rows]).any(dim=1)
    assert moved.all() and len(moved) == report.vocab_size
