#!/usr/bin/env python
"""How fast corpora become data sets, against the tokenizer library alone on the same cores.

    python benchmarks/tokenise.py --workers 2 --output benchmarks/results/tokenise.csv

The text is Python's standard library and installed packages, cut to `--megabytes`, in JSON lines;
the tokenizers are byte-pair encodings trained on a sample of it. The library is given the texts in
memory, in large batches and with as many threads as the preprocessing has workers, and makes lists
of ids: SentencePiece's `encode(texts, num_threads=...)`, and `encode_batch_fast` of Hugging Face's
tokenizers. The preprocessing starts from the file and ends with the data set on disk. Both take
turns; the best of `--repeats` counts, as other work on the machine only ever slows down. On a busy
machine the processor seconds, workers included, say more than the wall clock: `cpu_ratio` compares
tokens per processor second.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import megatron_sat.training  # noqa: F401 (silences Megatron-core)
from megatron_sat.preprocess import preprocess
from megatron_sat.training.config import TokenizerType
from megatron_sat.training.tokenizer import build_tokenizer

_VOCABULARY = 16_000
_TRAINING_TEXTS = 400
_BATCH = 512  # all at once would need more memory and be slower


def collect_texts(megabytes: int) -> list[str]:
    """Python files of the installation, at most 100 kB each, `megabytes` in all."""
    texts, size = [], 0
    for root in (Path(os.__file__).parent, Path(sentencepiece.__file__).parents[1]):
        for path in sorted(root.rglob("*.py")):
            if size >= megabytes << 20:
                return texts
            if path.stat().st_size <= 100_000:
                text = path.read_text(encoding="utf-8", errors="ignore")
                if text:
                    texts.append(text)
                    size += len(text.encode())
    return texts


def train_sentencepiece(texts: list[str], folder: Path) -> Path:
    """The file of a SentencePiece model with byte fallback, as Llama's."""
    model = folder / "pieces.model"
    with open(model, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines()),
            model_writer=writer,
            model_type="bpe",
            vocab_size=_VOCABULARY,
            byte_fallback=True,
            minloglevel=2,
        )
    return model


def train_hugging_face(texts: list[str], folder: Path) -> Path:
    """The folder of a byte-level tokenizer as GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    path = folder / "fast"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    return path


def seconds(action: Callable[[], int]) -> tuple[float, float, int]:
    """Wall clock and processor seconds of an action, and its tokens."""
    begin, begin_cpu = time.perf_counter(), _cpu_seconds()
    tokens = action()
    return time.perf_counter() - begin, _cpu_seconds() - begin_cpu, tokens


def _cpu_seconds() -> float:
    """Of this process and of those that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    kind: TokenizerType, path: Path, source: Path, texts: list[str], *, workers: int, repeats: int
) -> dict[str, object]:
    """One row: tokens per second of the library and of the preprocessing, and their ratio."""
    tokenizer = build_tokenizer(kind, str(path))
    pieces = fast = None
    if kind == "SentencePieceTokenizer":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    else:
        fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))

    def library() -> int:
        if pieces is not None:
            return sum(map(len, pieces.encode(texts, out_type=int, num_threads=workers)))
        assert fast is not None
        count = 0
        for begin in range(0, len(texts), _BATCH):
            batch = texts[begin : begin + _BATCH]
            encoded = fast.encode_batch_fast(batch, add_special_tokens=False)
            count += sum(len(encoding.ids) for encoding in encoded)
        return count

    def ours() -> int:
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            done = preprocess(
                inputs=[str(source)],
                output_prefix=f"{folder}/out",
                tokenizer=tokenizer,
                workers=workers,
            )
        return done.tokens

    times: dict[str, list[float]] = {"library": [], "preprocess": []}
    cpu_times: dict[str, list[float]] = {"library": [], "preprocess": []}
    tokens = set()
    for _ in range(repeats):
        for name, action in (("preprocess", ours), ("library", library)):
            elapsed, cpu, count = seconds(action)
            times[name].append(elapsed)
            cpu_times[name].append(cpu)
            tokens.add(count)
    (count,) = tokens  # both made the same number
    best = {name: count / min(values) for name, values in times.items()}
    return {
        "tokenizer": kind,
        "megabytes": round(source.stat().st_size / 2**20, 1),
        "tokens": count,
        "workers": workers,
        "library_tokens_per_second": round(best["library"]),
        "tokens_per_second": round(best["preprocess"]),
        "ratio": round(best["preprocess"] / best["library"], 3),
        "cpu_ratio": round(min(cpu_times["library"]) / min(cpu_times["preprocess"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=int, default=64, help="of text (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add("--repeats", type=int, default=3, help="of each (default: %(default)s)")
    add("--output", metavar="CSV", help="also write the rows here")
    args = parser.parse_args()
    # Read when the library's thread pool is first used.
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    texts = collect_texts(args.megabytes)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        with open(source, "w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}) + "\n")
        step = max(1, len(texts) // _TRAINING_TEXTS)
        sample = texts[::step]
        tokenizer_files: dict[TokenizerType, Path] = {
            "SentencePieceTokenizer": train_sentencepiece(sample, Path(folder)),
            "HuggingFaceTokenizer": train_hugging_face(sample, Path(folder)),
        }
        for kind, path in tokenizer_files.items():
            row = measure(kind, path, source, texts, workers=args.workers, repeats=args.repeats) | {
                "cpu": _cpu(),
                "python": platform.python_version(),
                "date": datetime.date.today().isoformat(),
            }
            rows.append(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.output:
        with open(args.output, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
