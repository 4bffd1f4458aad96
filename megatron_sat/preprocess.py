"""From JSON lines to the indexed data sets that training reads.

Chunks of lines are tokenized in any number of processes and written in their order, so the files
do not depend on the number of workers. Output grows under temporary names and is renamed when it
is complete.
"""

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_sat.training.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 20


@dataclass(kw_only=True)
class Progress:
    """How far `preprocess` is. Documents and tokens are those written, over all keys."""

    bytes_total: int
    """Size of the input."""
    bytes_done: int = 0
    documents: int = 0
    empty_documents: int = 0
    """Documents without a token; they are left out."""
    tokens: int = 0


@dataclass(frozen=True)
class _Chunk:
    """Consecutive lines of a file; the first has the number `first_line`, counted from 1."""

    path: str
    first_line: int
    lines: list[bytes]


@dataclass(frozen=True)
class _Encoded:
    """The documents of a chunk: for each key their tokens, in one array, and their lengths."""

    tokens: list[np.ndarray]
    lengths: list[list[int]]
    empty_documents: int
    bytes_done: int


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Tokenizer
    json_keys: tuple[str, ...]
    append_eod: bool
    dtype: type[np.number]

    def __call__(self, chunk: _Chunk) -> _Encoded:
        tokens: list[list[int]] = [[] for _ in self.json_keys]
        lengths: list[list[int]] = [[] for _ in self.json_keys]
        empty = 0
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if not line.strip():
                continue
            for i, ids in enumerate(self._documents(line, f"{chunk.path}:{number}")):
                if not ids:
                    empty += 1
                    continue
                tokens[i] += ids
                if self.append_eod:
                    tokens[i].append(self.tokenizer.eod)
                lengths[i].append(len(ids) + self.append_eod)
        return _Encoded(
            tokens=[np.array(ids, dtype=self.dtype) for ids in tokens],
            lengths=lengths,
            empty_documents=empty,
            bytes_done=sum(map(len, chunk.lines)),
        )

    def _documents(self, line: bytes, where: str) -> Iterator[list[int]]:
        """Token ids under each key of the record in `line`. ValueError that begins with `where`."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: not a JSON object but {type(record).__name__}")
        for key in self.json_keys:
            if key not in record:
                raise ValueError(
                    f'{where}: no key "{key}" (--json-keys); the record has '
                    f"{', '.join(record) or 'none'}"
                )
            text = record[key]
            if not isinstance(text, str):
                raise ValueError(f'{where}: "{key}" is not a string but {type(text).__name__}')
            try:
                text.encode()  # a lone surrogate is valid JSON and not valid text
                ids = self.tokenizer.tokenize(text)
            except ValueError as error:
                raise ValueError(f'{where}: "{key}" cannot be tokenized ({error})') from error
            yield ids


# A worker's encoder: sent once to each process, not with each chunk.
_worker_encoder: _Encoder | None = None


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C goes to the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(chunk: _Chunk) -> _Encoded:
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


def preprocess(
    *,
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer: Tokenizer,
    json_keys: Sequence[str] = ("text",),
    workers: int = 1,
    append_eod: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Tokenize the files `inputs`, one JSON object a line, into one data set per key, named
    `<output_prefix>_<key>_document.bin` and `.idx`. Empty lines are ignored.

    `append_eod` ends each document with the tokenizer's `eod`. `on_progress` is called now and
    then in this process. Tokens are uint16 where the vocabulary allows it, else int32.

    Returns the final counts. Raises ValueError, leaving no output: for the first bad record with
    its file and line, an input that is missing, output that exists, input without a document.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}; valid: at least 1")
    for path in inputs:
        if not Path(path).is_file():
            raise ValueError(f"--input: {path} is not a file")
    progress = Progress(bytes_total=sum(Path(path).stat().st_size for path in inputs))
    encoder = _Encoder(
        tokenizer=tokenizer,
        json_keys=tuple(dict.fromkeys(json_keys)),
        append_eod=append_eod,
        dtype=DType.optimal_dtype(tokenizer.vocab_size),
    )
    with ExitStack() as cleanup:
        outputs = []
        for key in encoder.json_keys:
            outputs.append(_Output(f"{output_prefix}_{key}_document", encoder.dtype))
            cleanup.callback(outputs[-1].discard)
        for encoded in _encode_all(encoder, _chunks(inputs), workers=workers):
            for output, tokens, lengths in zip(
                outputs, encoded.tokens, encoded.lengths, strict=True
            ):
                output.add(tokens, lengths)
                progress.documents += len(lengths)
                progress.tokens += len(tokens)
            progress.empty_documents += encoded.empty_documents
            progress.bytes_done += encoded.bytes_done
            if on_progress is not None:
                on_progress(progress)
        for key, output in zip(encoder.json_keys, outputs, strict=True):
            if not output.builder.sequence_lengths:
                raise ValueError(f'--input: no document with a token under the key "{key}"')
            output.finish()
        for output in outputs:
            output.publish()
    return progress


def _chunks(inputs: Sequence[str]) -> Iterator[_Chunk]:
    for path in inputs:
        lines: list[bytes] = []
        size, first = 0, 1
        with open(path, "rb") as stream:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= _CHUNK_BYTES:
                    yield _Chunk(path, first, lines)
                    first += len(lines)
                    lines, size = [], 0
        if lines:
            yield _Chunk(path, first, lines)


def _encode_all(encoder: _Encoder, chunks: Iterator[_Chunk], *, workers: int) -> Iterator[_Encoded]:
    """Encode the chunks in order; an error is that of the first bad chunk."""
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
