"""Which share of a run each corpus gets, and how often the run goes through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sat.training.data import parse_blend
from megatron_sat.training.indexed_data import inspect
from megatron_sat.whole_file import whole_file


@dataclass(frozen=True)
class Part:
    """Corpora that together get `weight` of the training data, each in proportion to its size."""

    weight: float
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class BlendRow:
    """One corpus of a blend."""

    prefix: str
    documents: int
    tokens: int
    share: float
    """Of the training samples; the shares of a blend add up to 1."""

    def epochs(self, training_tokens: float) -> float:
        """How often a run of so many tokens goes through the corpus."""
        return self.share * training_tokens / self.tokens


def parse_part(values: Sequence[str]) -> Part:
    """`WEIGHT PREFIX [PREFIX ...]` of `--part`. ValueError for anything else."""
    try:
        weight = float(values[0])
    except ValueError:
        weight = 0.0
    if not (0 < weight < float("inf")) or len(values) < 2:
        raise ValueError(
            f"--part {' '.join(values)}: give a weight above 0 and prefixes of data sets, as "
            "--part 0.9 data/new_text_document"
        )
    return Part(weight, tuple(values[1:]))


def read_blend(path: str) -> list[Part]:
    """The parts of a file as `--data-args-path` takes it: one for each weight and prefix; without
    weights one for all. ValueError, naming the file, if it is none."""
    flag = f"--blend {path}"
    try:
        values = tuple(Path(path).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} cannot be read ({error})") from error
    prefixes, weights = parse_blend(values, flag=flag)
    if weights is None:
        return [Part(1.0, tuple(prefixes))]
    return [Part(weight, (prefix,)) for weight, prefix in zip(weights, prefixes, strict=True)]


def blend_rows(parts: Sequence[Part]) -> list[BlendRow]:
    """The corpora of the parts, in their order.

    ValueError, naming the prefix: a data set that is missing or damaged, or given twice.
    """
    total = sum(part.weight for part in parts)
    rows: list[BlendRow] = []
    for part in parts:
        data = [inspect(prefix, flag="--part") for prefix in part.prefixes]
        sizes = [item.tokens((0.0, 1.0)) for item in data]
        for item, size in zip(data, sizes, strict=True):
            if any(row.prefix == item.prefix for row in rows):
                raise ValueError(f"--part: {item.prefix} is given twice")
            share = part.weight / total * size / sum(sizes)
            rows.append(BlendRow(item.prefix, len(item.lengths), size, share))
    return rows


def write_blend(path: str, rows: Sequence[BlendRow]) -> None:
    """Write `weight prefix` lines, for `--data-args-path`. ValueError if the file exists or cannot
    be written."""
    target = Path(path)
    if target.exists():
        raise ValueError(f"--output: {path} exists; remove it or give another name")
    for row in rows:
        if len(row.prefix.split()) != 1:
            raise ValueError(f"--part: {row.prefix!r}: Megatron's blends allow no blanks in names")
    try:
        with whole_file(target) as partial:
            partial.write_text("".join(f"{row.share:.9g} {row.prefix}\n" for row in rows))
    except OSError as error:
        raise ValueError(f"--output: {path} cannot be written ({error.strerror})") from error
