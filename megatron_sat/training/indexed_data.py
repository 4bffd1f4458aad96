"""What a Megatron data set on disk (`PREFIX.idx` and `PREFIX.bin`) holds, and whether it is whole.

Megatron-core maps both files into memory and trusts them: a truncated file or a foreign token id
would surface somewhere in training, if at all. These checks read the index and some of the tokens.

The layout of an index (`megatron.core.datasets.indexed_dataset`): 9 bytes magic, version, type
code, number of sequences S, number of documents + 1 D, then int32 lengths [S], int64 byte offsets
[S], int64 document ends [D].
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_SCANNED_TOKENS = 1 << 22
_SCANNED_BLOCKS = 64
_SCANNED_ENTRIES = 1 << 20


@dataclass(frozen=True, eq=False)
class IndexedData:
    """A data set whose two files are whole and fit each other."""

    prefix: str
    """Path without `.bin` or `.idx`."""
    dtype: np.dtype
    """Integer type of the tokens."""
    lengths: np.ndarray
    """Tokens of each document, [documents] int32."""
    offsets: np.ndarray
    """Where each document begins in the `.bin`, in bytes, [documents] int64."""
    ends: np.ndarray
    """0, and after how many sequences each document ends, [documents + 1] int64. Nothing here
    reads them but `check_index`."""

    @cached_property
    def fingerprint(self) -> str:
        """Of the documents' lengths: 16 hex digits, the same wherever the files lie."""
        return hashlib.blake2b(self.lengths.data, digest_size=8).hexdigest()

    def documents(self, share: tuple[float, float]) -> range:
        """The documents of a share (begin, end) of a split; Megatron-core rounds the same way."""
        count = len(self.lengths)
        return range(round(share[0] * float(count)), round(share[1] * float(count)))

    def tokens(self, share: tuple[float, float]) -> int:
        """Tokens of those documents."""
        documents = self.documents(share)
        return int(self.lengths[documents.start : documents.stop].sum(dtype=np.int64))


def inspect(prefix: str, *, flag: str) -> IndexedData:
    """Check the two files of `prefix` by their headers and sizes.

    `flag` names the option that gave the prefix. Raises ValueError naming it and the file: one
    that is missing or unreadable, a foreign or truncated index, a `.bin` of another size than the
    index says, lengths below 0, a data set without documents.
    """
    idx, bin_ = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    try:
        for path in (idx, bin_):
            if not path.is_file():
                raise ValueError(f"{flag}: {path} does not exist{_hint(prefix)}")
        with idx.open("rb") as stream:
            header = stream.read(_HEADER.size)
        idx_size, bin_size = idx.stat().st_size, bin_.stat().st_size
        with bin_.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{flag}: {error.filename} cannot be read ({error.strerror})") from error

    if not header.startswith(_MAGIC):
        raise ValueError(f"{flag}: {idx} is not the index of a Megatron data set (wrong magic)")
    if len(header) < _HEADER.size:
        raise ValueError(f"{flag}: {idx} is truncated: it has {idx_size} bytes")
    _, version, code, sequences, document_ends = _HEADER.unpack(header)
    if version != 1:
        raise ValueError(f"{flag}: {idx} has format version {version}; only 1 is known")
    if code not in {kind.value for kind in DType} or not np.issubdtype(
        DType.dtype_from_code(code), np.integer
    ):
        raise ValueError(f"{flag}: {idx} does not hold integer tokens (type code {code})")
    expected = _HEADER.size + 12 * sequences + 8 * document_ends
    if idx_size != expected:
        problem = "is truncated" if idx_size < expected else "is damaged"
        raise ValueError(
            f"{flag}: {idx} {problem}: it has {idx_size} bytes, its header announces {expected}"
        )
    if sequences == 0:
        raise ValueError(f"{flag}: {idx} holds no documents")

    position = _HEADER.size
    lengths = np.memmap(idx, np.int32, "r", offset=position, shape=(sequences,))
    if lengths.min() < 0:
        at = int(lengths.argmin())
        raise ValueError(
            f"{flag}: {idx} is damaged: it says that document {at} has {lengths[at]} tokens"
        )
    position += lengths.nbytes
    offsets = np.memmap(idx, np.int64, "r", offset=position, shape=(sequences,))
    position += offsets.nbytes
    ends = np.empty(0, np.int64)
    if document_ends:
        ends = np.memmap(idx, np.int64, "r", offset=position, shape=(document_ends,))
    dtype = np.dtype(DType.dtype_from_code(code))
    expected = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if bin_size != expected:
        problem = "is truncated" if bin_size < expected else "does not belong to its index"
        raise ValueError(
            f"{flag}: {bin_} {problem}: it has {bin_size} bytes, {idx} announces {expected}"
        )
    if expected == 0:
        raise ValueError(f"{flag}: {bin_} holds no tokens")
    return IndexedData(prefix=prefix, dtype=dtype, lengths=lengths, offsets=offsets, ends=ends)


def _hint(prefix: str) -> str:
    """What the prefix should have been, where files of such a name are there."""
    if prefix.endswith((".bin", ".idx")):
        return f"; give the prefix without {prefix[-4:]}"
    # tools/preprocess_data.py adds the key of the text and the level to --output-prefix.
    written = sorted(Path(prefix).parent.glob(f"{escape(Path(prefix).name)}_*_document.idx"))
    if not written:
        return ""
    return "; is it " + " or ".join(str(path)[: -len(".idx")] for path in written) + "?"


def check_index(data: IndexedData, *, flag: str) -> None:
    """Whether the documents of the index lie one after the other, as Megatron-core writes them.

    Reads all of the index. Raises ValueError naming `flag`, the file and the first document that
    does not.
    """
    idx = get_idx_path(data.prefix)
    expected = 0
    for begin in range(0, len(data.lengths), _SCANNED_ENTRIES):
        part = slice(begin, begin + _SCANNED_ENTRIES)
        stops = expected + data.lengths[part].cumsum(dtype=np.int64) * data.dtype.itemsize
        starts = np.concatenate([[expected], stops[:-1]])
        wrong = np.flatnonzero(data.offsets[part] != starts)
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"{flag}: {idx} is damaged: document {begin + at} begins at byte "
                f"{data.offsets[begin + at]} of the .bin; by the lengths of those before it, that "
                f"is byte {starts[at]}"
            )
        expected = int(stops[-1])
    last = 0
    for begin in range(0, len(data.ends), _SCANNED_ENTRIES):
        entries = data.ends[begin : begin + _SCANNED_ENTRIES]
        steps = np.diff(entries, prepend=last if begin else entries[0])
        wrong = np.flatnonzero((steps < 0) | (entries < 0) | (entries > len(data.lengths)))
        if len(wrong) or (begin == 0 and entries[0] != 0):
            at = int(wrong[0]) if len(wrong) else 0
            raise ValueError(
                f"{flag}: {idx} is damaged: entry {begin + at} of its document ends is "
                f"{entries[at]}; they rise from 0 to {len(data.lengths)}"
            )
        last = int(entries[-1])
    if last != len(data.lengths):
        raise ValueError(
            f"{flag}: {idx} is damaged: its document ends stop at {last} of {len(data.lengths)} "
            "documents"
        )


def check_token_ids(data: IndexedData, *, vocab_size: int, flag: str) -> None:
    """Look for token ids outside [0, vocab_size): in all of a data set of up to 4 Mi tokens, else
    in 64 blocks spread evenly over it, 4 Mi tokens in all.

    Raises ValueError naming `flag`, the file, the id and where it stands.
    """
    path = get_bin_path(data.prefix)
    tokens = np.memmap(path, data.dtype, "r")
    blocks = 1 if len(tokens) <= _SCANNED_TOKENS else _SCANNED_BLOCKS
    length = min(len(tokens), _SCANNED_TOKENS // blocks)
    for start in np.linspace(0, len(tokens) - length, blocks, dtype=np.int64):
        block = tokens[start : start + length]
        for position in (int(block.argmax()), int(block.argmin())):
            if not 0 <= block[position] < vocab_size:
                raise ValueError(
                    f"{flag}: {path} holds token id {block[position]} at token {start + position}, "
                    f"but the vocabulary has {vocab_size} ids: it was written with another "
                    "tokenizer (or --vocab-size is too small)"
                )
