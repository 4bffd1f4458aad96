"""Training and validation data: Megatron-core's data sets, checked, indexed and shared by ranks.

The samples, their order and the blends are Megatron-core's `GPTDataset` and `BlendedDataset`. What
is arranged here instead of in its builder is how ranks come to them. The builder runs barriers
between the ranks' turns, so an error on rank 0 would leave the others waiting; and it writes index
caches in place, so a run that was stopped there, or two runs that start together, would leave or
meet half a file. Here rank 0 builds into a folder of another name and renames it when it is
complete, errors are exchanged, and then every rank maps the finished files.

The order of the training samples follows from the files, `--split`, `--seq-length`, `--seed` and
the number of samples of the run (`--train-iters` times `--global-batch-size`): once the data are
used more than once, a changed number reorders them.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import megatron.core
import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize

from megatron_sat.training.batches import Dataset
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.indexed_data import IndexedData, check_index, check_token_ids, inspect
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.tokenizer import Tokenizer
from megatron_sat.training.watchdog import Watchdog

_WHOLE = (0.0, 1.0)
_MOST_SAMPLES = 2**31 - 1
_MOST_PASSES = 1_000_000

Described: TypeAlias = dict[str, list[dict[str, Any]]]
"""What the data of a run are, in plain JSON values: the parts of the training data under "train",
those of each validation set under "valid NAME"."""


@dataclass(frozen=True, eq=False)
class Datasets:
    """What a run reads."""

    train: Dataset
    """At least the samples of the run, as many passes as that takes."""
    validation: dict[str, Dataset]
    """Named validation sets, every sample once. Empty without evaluation."""
    described: Described = field(default_factory=dict)
    """What they are, for checkpoints."""


@dataclass(frozen=True, eq=False)
class _Source:
    """One data set to build: a share of the documents of one or several files."""

    flag: str
    parts: tuple[IndexedData, ...]
    weights: tuple[float, ...] | None
    split: Split
    share: tuple[float, float]
    samples: int | None
    """None: each sample once."""


def parse_blend(values: tuple[str, ...], *, flag: str) -> tuple[list[str], list[float] | None]:
    """Split Megatron's blend list into prefixes and weights: "weight prefix weight prefix ...", or
    prefixes alone (weights None: in proportion to their sizes).

    Raises ValueError naming `flag`: a weight that is not above 0, a list that is neither form.
    """
    if not values:
        raise ValueError(f"{flag}: no data set given")
    weights = [_number(value) for value in values[::2]]
    if len(values) == 1 or all(weight is None for weight in weights):
        return list(values), None
    prefixes = list(values[1::2])
    if len(values) % 2 or None in weights:
        raise ValueError(
            f"{flag}: '{' '.join(values)}' is neither a list of prefixes nor pairs of weight and "
            "prefix"
        )
    blend = [weight for weight in weights if weight is not None]
    for weight, prefix in zip(blend, prefixes, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"{flag}: weight {weight} of {prefix} must be a number above 0")
    return prefixes, blend if len(prefixes) > 1 else None


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def build_datasets(
    config: TrainingConfig,
    tokenizer: Tokenizer,
    *,
    samples: int | None = None,
    check: Callable[[Described], None] | None = None,
    watchdog: Watchdog | None = None,
) -> Datasets:
    """Check the data, index them and open them. Every rank calls this.

    `samples` is the number of training samples of the whole run, `train_iters * global_batch_size`
    by default. `check` is told what the data are before anything is written, and may refuse them
    by a ValueError. `watchdog` is told of each data set that is indexed.

    Raises ValueError (with several ranks `RanksStopped`, on all of them) that names the flag and
    the file: files that are missing, truncated or not a data set, bad blend weights, token ids
    beyond the vocabulary, fewer tokens than one sample takes, a cache folder that cannot be
    written or holds something else than arrays.
    """
    watchdog = Watchdog() if watchdog is None else watchdog
    watchdog.at("checking the data", slow=True)
    with ranks_agree("checking the data"):
        if samples is None:
            samples = config.train_iters * config.global_batch_size
        sources = _checked_sources(config, tokenizer, samples=samples)
        described = {
            f"valid {name}" if name else "train": _describe(item) for name, item in sources.items()
        }
        if check is not None:
            check(described)
        caches = {name: _cache_folder(item, config, tokenizer) for name, item in sources.items()}
    for name, source in sources.items():
        watchdog.at(f"indexing the data{name and f' of {name}'}", slow=True)
        with ranks_agree("indexing the data"):  # of each: no collective waits for all of them
            if not dist.is_initialized() or dist.get_rank() == 0:
                _write_cache(source, config, tokenizer, caches[name])
            else:
                watchdog.waits()
    watchdog.at("opening the data", slow=True)
    with ranks_agree("opening the data"):
        for folder in caches.values():
            if not folder.is_dir():
                raise ValueError(
                    f"--data-cache-path: the index {folder}, which rank 0 wrote, is not there on "
                    f"rank {dist.get_rank()}; give a folder that all nodes share"
                )
            _check_cache(folder)
        datasets = {
            name: _construct(source, _gpt_config(source, config, tokenizer, caches[name]))
            for name, source in sources.items()
        }
    return Datasets(train=datasets.pop(""), validation=datasets, described=described)


def _describe(source: _Source) -> list[dict[str, Any]]:
    """Of each part, in plain JSON values: its name, its share of the blend, and which documents of
    which files it has. Equal, the name aside, wherever the samples are equal for given flags."""
    return [
        {
            "name": Path(part.prefix).name,
            "weight": round(weight, 9),
            "documents": [documents.start, documents.stop],
            "tokens": part.tokens(source.share),
            "fingerprint": part.fingerprint,
        }
        for part, weight in zip(source.parts, _weights(source), strict=True)
        for documents in [part.documents(source.share)]
    ]


def _weights(source: _Source) -> list[float]:
    """Shares of the blend, which add up to 1."""
    return normalize(
        list(source.weights or (float(part.tokens(source.share)) for part in source.parts))
    )


def _checked_sources(
    config: TrainingConfig, tokenizer: Tokenizer, *, samples: int
) -> dict[str, _Source]:
    """The training source under the name "", and each validation source under its own."""
    data = config.data
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    inspected: dict[str, IndexedData] = {}

    def source(
        blend: tuple[str, ...], flag: str, split: Split, share: tuple[float, float] | None
    ) -> _Source:
        prefixes, weights = parse_blend(blend, flag=flag)
        for prefix in prefixes:
            if prefix not in inspected:
                inspected[prefix] = inspect(prefix, flag=flag)
                if not dist.is_initialized() or dist.get_rank() == 0:
                    check_index(inspected[prefix], flag=flag)
                    check_token_ids(inspected[prefix], vocab_size=vocab_size, flag=flag)
        if share is None:
            raise ValueError(f"--split {data.split} leaves no documents for training")
        return _Source(
            flag=flag,
            parts=tuple(inspected[prefix] for prefix in prefixes),
            weights=None if weights is None else tuple(weights),
            split=split,
            share=share,
            samples=samples if split is Split.train else None,
        )

    valid_share: tuple[float, float] | None = None
    if data.train_data_path:
        train = source(data.train_data_path, "--train-data-path", Split.train, _WHOLE)
    else:
        assert data.split is not None  # the arguments give it a default
        shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(data.split))
        train = source(data.data_path, data.data_path_flag, Split.train, shares[Split.train.value])
        valid_share = shares[Split.valid.value]
    sources = {"": train}
    if config.eval_iters > 0:
        if valid_share is not None:
            sources["valid"] = source(data.data_path, data.data_path_flag, Split.valid, valid_share)
        for name, blend in data.valid_data.items():
            flag = "--valid-data-path" if name == "valid" else f"--valid-data {name}"
            sources[name] = source(blend, flag, Split.valid, _WHOLE)
    for item in sources.values():
        _check_size(item, config)
    return sources


def _check_size(source: _Source, config: TrainingConfig) -> None:
    needed = config.model.seq_length + 1
    for part in source.parts:
        tokens = part.tokens(source.share)
        if tokens < needed:
            where, advice = "", ""
            if source.share != _WHOLE:
                kind = "training" if source.split is Split.train else "validation"
                where = (
                    f" in its {kind} share ({len(part.documents(source.share))} of "
                    f"{len(part.lengths)} documents, --split {config.data.split})"
                )
                advice = _advice_on_split(source.parts, needed)
            raise ValueError(
                f"{source.flag}: {part.prefix} has {tokens} tokens{where}; one sample of "
                f"--seq-length {config.model.seq_length} needs {needed}{advice}"
            )
    if source.samples is None:
        return
    # What is drawn is indexed in memory: a count that is a mistake would fill it.
    passes = (
        source.samples
        * config.model.seq_length
        / sum(part.tokens(source.share) for part in source.parts)
    )
    if passes > _MOST_PASSES or source.samples > _MOST_SAMPLES:
        raise ValueError(
            f"--train-iters {config.train_iters} x --global-batch-size {config.global_batch_size} "
            f"is {source.samples} samples, {passes:.3g} passes through {source.flag}; valid: up to "
            f"{_MOST_SAMPLES} samples and {_MOST_PASSES} passes"
        )


def _advice_on_split(parts: tuple[IndexedData, ...], needed: int) -> str:
    """The `--split` with the smallest validation share of which both shares hold a sample."""
    for share in (1, 2, 5, 10, 20, 30, 40, 50):
        split = f"{100 - share},{share},0"
        train, valid, _ = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        if all(part.tokens(train) >= needed <= part.tokens(valid) for part in parts):
            return f"; --split {split} would fit"
    return (
        "; no split would fit: give validation data of its own with --valid-data NAME=PREFIX, and "
        "no --split"
    )


def _gpt_config(
    source: _Source, config: TrainingConfig, tokenizer: Tokenizer, cache: Path
) -> GPTDatasetConfig:
    # Attention masks [s, s] are never built: a batch carries document boundaries instead.
    return GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.model.seq_length,
        blend=([part.prefix for part in source.parts], None),
        split="1" if source.share == _WHOLE else config.data.split,
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,
    )


def _construct(source: _Source, config: GPTDatasetConfig) -> Dataset:
    """Open the Megatron-core data set over the indices in `config.path_to_cache`; rank 0 (or a
    lone process) builds those that are missing."""
    weights = _weights(source)
    alone = len(source.parts) == 1
    datasets = []
    for part, weight in zip(source.parts, weights, strict=True):
        samples = source.samples
        if samples is not None and not alone:
            # Blending draws the set that is furthest behind: at most one more than its share.
            samples = math.ceil(samples * weight) + 1
        documents = part.documents(source.share)
        datasets.append(
            GPTDataset(
                GPTDataset.build_low_level_dataset(part.prefix, config),
                part.prefix,
                np.arange(documents.start, documents.stop, dtype=np.int32),
                samples,
                source.split,
                config,
            )
        )
    if alone:
        return datasets[0]
    if not dist.is_initialized():
        # BlendedDataset asks for a rank before it writes its cache; without one it builds anew.
        config = replace(config, path_to_cache=None)
    if source.samples is not None:
        return BlendedDataset(datasets, weights, source.samples, config)
    counts = [len(dataset) for dataset in datasets]
    if source.weights is not None:
        # The largest blend of these weights that shows no sample twice.
        scale = min(count / weight for count, weight in zip(counts, weights, strict=True))
        counts = [
            min(count, max(1, int(scale * weight + 1e-9)))
            for count, weight in zip(counts, weights, strict=True)
        ]
    return BlendedDataset(datasets, counts, None, config)


def _cache_folder(source: _Source, config: TrainingConfig, tokenizer: Tokenizer) -> Path:
    """The folder of a source's indices. Its name covers all that decides them, the documents'
    lengths included: files written anew under an old prefix do not meet their old index."""
    facts = {
        "megatron-core": megatron.core.__version__,
        "prefixes": [part.prefix for part in source.parts],
        "fingerprints": [part.fingerprint for part in source.parts],
        "weights": source.weights,
        "share": source.share,
        "split": [source.split.name, config.data.split],
        "samples": source.samples,
        "seq_length": config.model.seq_length,
        "seed": config.seed,
        "tokenizer": tokenizer.unique_identifiers,
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8)
    root = config.data.data_cache_path or Path(source.parts[0].prefix).parent / "index-cache"
    return Path(root) / f"{source.split.name}-{digest.hexdigest()}"


def _check_cache(folder: Path) -> None:
    """Refuse what is no array of numbers: Megatron-core has numpy unpickle such a file, which calls
    whatever the file names."""
    for path in sorted(folder.glob("*.npy")):
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"--data-cache-path: the index {path} is damaged ({error}); remove its folder"
            ) from error
        if not isinstance(found, np.ndarray):
            raise ValueError(f"--data-cache-path: the index {path} is no array; remove its folder")


def _write_cache(
    source: _Source, config: TrainingConfig, tokenizer: Tokenizer, folder: Path
) -> None:
    """Build the indices of a source into `folder`, unless it is there: then it is complete."""
    if folder.is_dir():
        return
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        building.mkdir(parents=True)
        _construct(source, _gpt_config(source, config, tokenizer, building))
        os.rename(building, folder)
    except OSError as error:
        # Another run that started at the same time may have finished the same folder.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise ValueError(
                f"--data-cache-path: the index cache {folder} cannot be written "
                f"({error.strerror or error}); give a folder that rank 0 can write to"
            ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
