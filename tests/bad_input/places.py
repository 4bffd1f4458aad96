"""A folder with one valid input of each kind, and the commands that read them."""

import gzip
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file

from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import tiny_run, train_on_ranks, write_indexed_data
from megatron_sat.testing.vocabulary import write_base

TEXT = "the quick brown fox jumps over the lazy dog"
# With static selection there are rankings to save, too.
SAVED = "--sat-omission-rate 0.5 --sat-selection static --train-iters 2 --lr-warmup-iters 0 "
SAVED += "--eval-iters 0"


def make_inputs(folder: Path, *, checkpoint: bool = True) -> Path:
    """Write the inputs into ``folder``, which exists."""
    (folder / "data").mkdir()
    (folder / "new").mkdir()  # what the commands write
    write_indexed_data(folder / "data" / "numbers", documents=20)
    _make_texts(folder)
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (folder / "blend.txt").write_text(f"0.5 {folder}/data/numbers 0.5 {folder}/data/numbers\n")
    write_tokenizer(write_model(folder / "hf", "llama3", max_shard_size="60KB"))
    write_tokenizer(write_model(folder / "bin", "llama3"))
    weights = folder / "bin" / "model.safetensors"
    torch.save(load_file(weights), folder / "bin" / "pytorch_model.bin")
    weights.unlink()
    write_base(folder / "base", "sentencepiece and json")
    write_base(folder / "bytes", "bytes")
    write_base(folder / "pieces-only", "sentencepiece")
    (folder / "pieces.txt").write_text("κόσμος\nfoxes\n")
    if checkpoint:
        save = folder / "save"
        train_on_ranks(tiny_run(folder / "data" / "numbers", SAVED, save=save), 2)
        shutil.rmtree(save / "tensorboard")
    return folder


def _make_texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4),
        model_prefix=str(folder / "pieces"),
        vocab_size=30,
        minloglevel=2,
    )
    lines = "".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(8))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    table = pyarrow.table({"text": [TEXT] * 4, "number": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")


def command_line(command: str, inputs: Path) -> list[str]:
    """The valid command line of a command, without its name; its flags may be given again."""
    data, save = inputs / "data" / "numbers", inputs / "new" / "save"
    if command == "train saved":
        return tiny_run(data, f"{SAVED} --data-cache-path {inputs}/new/cache", save=save)
    if command == "train":
        return tiny_run(data, f"--eval-iters 0 --data-cache-path {inputs}/new/cache", save=save)
    line = {
        "train hf": f"--load-hf {inputs}/hf --seq-length 32 --train-data-path {data} "
        "--num-workers 0 --tokenizer-type NullTokenizer --micro-batch-size 2 --train-iters 4 "
        f"--lr 0.01 --eval-iters 0 --data-cache-path {inputs}/new/cache --save {save}",
        "preprocess": f"--input {inputs}/lines.jsonl --output-prefix {inputs}/new/out "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {inputs}/pieces.model",
        "blend": f"--output {inputs}/new/blend.txt",
        "extend": f"--base {inputs}/base --pieces {inputs}/pieces.txt --output {inputs}/new/out",
        "convert": f"--load {inputs}/save --save-hf {inputs}/new/hf",
        "perplexity": f"--model {inputs}/hf --data {inputs}/lines.jsonl "
        f"--output {inputs}/new/report.json",
    }
    return line[command].split()
