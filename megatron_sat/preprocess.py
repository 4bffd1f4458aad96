"""From corpora to the indexed data sets that training reads.

Chunks of records are tokenized in any number of processes and written in their order, so the files
do not depend on the number of workers. Output grows under temporary names and is renamed when it
is complete.
"""

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sat.bad_input import shorten
from megatron_sat.corpora import (
    BadRecord,
    Chunk,
    Record,
    TextDocuments,
    decode,
    expand,
    read_chunks,
)
from megatron_sat.training.tokenizer import Tokenizer

_MOST_WORKERS = 4096


@dataclass(kw_only=True)
class Progress:
    """How far `preprocess` is. Documents and tokens are those written, over all keys."""

    bytes_total: int
    """Size of the input, compressed where it is."""
    bytes_done: int = 0
    documents: int = 0
    empty_documents: int = 0
    """Documents without a token; they are left out."""
    tokens: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Bad records by their reason; they are left out under all keys."""
    first_skipped: dict[str, str] = field(default_factory=dict)
    """The first bad record of each reason, as `file:line: reason (detail)`."""


@dataclass(frozen=True)
class _Encoded:
    """The documents of a chunk: for each key their tokens, in one array, and their lengths."""

    tokens: list[np.ndarray]
    lengths: list[list[int]]
    empty_documents: int
    skipped: Counter[str]
    first_skipped: dict[str, str]
    """In the order of the records."""
    bytes_done: int


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    json_keys: tuple[str, ...]
    append_eod: bool
    dtype: type[np.number]

    def __call__(self, chunk: Chunk) -> _Encoded:
        bad: list[BadRecord] = []
        good: list[Record] = []
        for record in decode(chunk, self.json_keys):
            if isinstance(record, BadRecord):
                bad.append(record)
            else:
                good.append(record)
        ids = self._tokenize(good, bad)
        bad.sort(key=lambda record: record.number)
        first: dict[str, str] = {}
        for record in bad:
            if record.reason not in first:
                first[record.reason] = record.describe(chunk)
        end = [self.tokenizer.eod] if self.append_eod else []
        tokens, lengths, empty = [], [], 0
        for texts in ids:
            documents = [document + end for document in texts if document]
            empty += len(texts) - len(documents)
            lengths.append([len(document) for document in documents])
            tokens.append(np.fromiter(chain.from_iterable(documents), self.dtype, sum(lengths[-1])))
        return _Encoded(
            tokens=tokens,
            lengths=lengths,
            empty_documents=empty,
            skipped=Counter(record.reason for record in bad),
            first_skipped=first,
            bytes_done=chunk.bytes_done,
        )

    def _tokenize(self, records: list[Record], bad: list[BadRecord]) -> list[list[list[int]]]:
        """The ids of each record's text under each key. Records that a tokenizer refuses are added
        to `bad` and left out."""
        try:
            return [
                self.tokenizer.tokenize_batch([record.texts[i] for record in records])
                for i in range(len(self.json_keys))
            ]
        except ValueError:
            pass  # one of them: which?
        ids: list[list[list[int]]] = [[] for _ in self.json_keys]
        for record in records:
            try:
                texts = [self.tokenizer.tokenize(text) for text in record.texts]
            except ValueError as error:
                bad.append(BadRecord(record.number, "cannot be tokenized", str(error)))
                continue
            for documents, document in zip(ids, texts, strict=True):
                documents.append(document)
        return ids


# A worker's encoder: sent once to each process, not with each chunk.
_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C goes to the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(chunk: Chunk) -> _Encoded:
    assert _worker_encoder is not None
    return _worker_encoder(chunk)


class _Output:
    """One data set in the making: temporary files until `publish`, nothing after `discard`."""

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self.files = {suffix: Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx")}
        for path in self.files.values():
            if path.exists():
                raise ValueError(
                    f"--output-prefix: {path} exists; remove it or give another prefix"
                )
        self.partial = {
            suffix: path.with_name(f"{path.name}.partial-{os.getpid()}")
            for suffix, path in self.files.items()
        }
        self._made = [place for place in self.files["bin"].parents if not place.exists()]
        self.files["bin"].parent.mkdir(parents=True, exist_ok=True)
        self.builder = IndexedDatasetBuilder(str(self.partial["bin"]), dtype=dtype)

    def add(self, tokens: np.ndarray, lengths: list[int]) -> None:
        begin = 0
        for length in lengths:
            self.builder.add_document(tokens[begin : begin + length], [length])
            begin += length

    def finish(self) -> None:
        self.builder.finalize(str(self.partial["idx"]))

    def publish(self) -> None:
        # The index comes last: without it, nothing takes the other file for a data set.
        for suffix in ("bin", "idx"):
            os.replace(self.partial[suffix], self.files[suffix])

    def discard(self) -> None:
        self.builder.data_file.close()
        for path in self.partial.values():
            path.unlink(missing_ok=True)
        for place in self._made:
            with suppress(OSError):  # not empty
                place.rmdir()


def preprocess(
    *,
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    json_keys: Sequence[str] = ("text",),
    text_documents: TextDocuments = "file",
    workers: int = 1,
    append_eod: bool = False,
    strict: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Tokenize the files that `inputs` (paths and glob patterns) name into one data set per key,
    `<output_prefix>_<key>_document.bin` and `.idx`.

    Formats, by the files' names: JSON lines (`.jsonl`, `.json`, `.ndjson`: one object a line,
    empty lines are ignored), Parquet (a column for each key), plain text (`.txt`, `.text`: each
    file a document, or with `text_documents` "blank-line" each run of lines without an empty one;
    the key is "text"). All but Parquet may be compressed with gzip or zstd.

    `append_eod` ends each document with the tokenizer's `eod`. A bad record is counted and left
    out; with `strict` it ends the run. `on_progress` is called now and then in this process.
    Tokens are uint16 where the vocabulary allows it, else int32.

    Returns the final counts. Raises ValueError, leaving no output: an input that is missing,
    damaged or of unknown format, output that exists, input without a document, and with `strict`
    the first bad record with its file and line.
    """
    if not 1 <= workers <= _MOST_WORKERS:
        raise ValueError(f"--workers is {shorten(workers)}; valid: 1 to {_MOST_WORKERS}")
    files = expand(inputs)
    progress = Progress(bytes_total=sum(Path(path).stat().st_size for path in files))
    encoder = _Encoder(
        tokenizer=tokenizer,
        json_keys=tuple(dict.fromkeys(json_keys)),
        append_eod=append_eod,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
    )
    chunks = chain.from_iterable(
        read_chunks(path, keys=encoder.json_keys, text_documents=text_documents) for path in files
    )
    with ExitStack() as cleanup:
        outputs = []
        for key in encoder.json_keys:
            outputs.append(_Output(f"{output_prefix}_{key}_document", encoder.dtype))
            cleanup.callback(outputs[-1].discard)
        for encoded in _encode_all(encoder, chunks, workers=workers):
            if strict and encoded.first_skipped:
                raise ValueError(next(iter(encoded.first_skipped.values())))
            for output, tokens, lengths in zip(
                outputs, encoded.tokens, encoded.lengths, strict=True
            ):
                output.add(tokens, lengths)
                progress.documents += len(lengths)
                progress.tokens += len(tokens)
            progress.empty_documents += encoded.empty_documents
            progress.bytes_done += encoded.bytes_done
            progress.skipped += encoded.skipped
            progress.first_skipped = encoded.first_skipped | progress.first_skipped
            if on_progress is not None:
                on_progress(progress)
        for key, output in zip(encoder.json_keys, outputs, strict=True):
            if not output.builder.sequence_lengths:
                raise ValueError(
                    "; ".join(
                        [
                            f'--input: no document with a token under the key "{key}"',
                            *(f"skipped {where}" for where in progress.first_skipped.values()),
                        ]
                    )
                )
            output.finish()
        for output in outputs:
            output.publish()
    return progress


def _encode_all(encoder: _Encoder, chunks: Iterator[Chunk], *, workers: int) -> Iterator[_Encoded]:
    """Encode the chunks in their order."""
    if workers == 1:
        yield from map(encoder, chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),  # the tokenizer is loaded already
        initializer=_start_worker,
        initargs=(encoder,),
    )
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 4 * workers:  # so much text is in memory at a time
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"--workers {workers}: a worker process died, perhaps for lack of memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
