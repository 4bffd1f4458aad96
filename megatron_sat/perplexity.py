"""Perplexity of a model on documents of several domains, comparable across vocabularies.

Every token of a document is predicted once, the first one from the start token (the tokenizer's
bos, else its eos). A document longer than the context is cut into windows; with `stride` below the
context they overlap, so that no token is predicted from less than `context - stride` tokens unless
its document has no more.

The rule of Skywork's evaluation, which the paper uses: the total loss of a domain over the number
of tokens that a reference tokenizer makes of its documents. The total is the log-probability of
the text, whatever its tokens are; tokens of the model's own would flatter a small vocabulary. The
average over domains is the arithmetic mean of their perplexities, as in the paper's tables.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_sat.bad_input import reason
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.corpora import BadRecord, Chunk, Record, decode, expand, place, read_chunks
from megatron_sat.training.initialize import ranks_agree
from megatron_sat.training.tokenizer import HuggingFaceTokenizer, Tokenizer

Dtype = Literal["float32", "bfloat16"]
LONGEST_CONTEXT = 4096
"""Tokens of a window where nothing is said and the model allows for more."""
_LOSS_POSITIONS = 1024
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class DomainResult:
    """One domain. Token counts leave start tokens aside."""

    documents: int
    characters: int
    tokens: int
    """Of the model's own tokenizer."""
    reference_tokens: int
    """Of the reference tokenizer."""
    total_loss: float
    """Sum of the negative log-probabilities of all tokens, in nats."""

    @property
    def loss(self) -> float:
        """Nats per reference token."""
        return self.total_loss / self.reference_tokens

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class PerplexityReport:
    """What `evaluate_perplexity` found."""

    model: str
    reference_tokenizer: str
    """The model's own where no other was given."""
    context: int
    stride: int
    domains: dict[str, DomainResult]

    @property
    def average_perplexity(self) -> float:
        """Arithmetic mean over the domains."""
        return sum(result.perplexity for result in self.domains.values()) / len(self.domains)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        for name, result in self.domains.items():
            values["domains"][name] |= {
                "loss": result.loss,
                "perplexity": _finite(result.perplexity),
            }
        return values | {"average_perplexity": _finite(self.average_perplexity)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def windows(tokens: int, *, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """How a document of `tokens` tokens, its start token included, is cut: `(begin, end, first)`.

    Tokens `[begin, end)` go in and predict tokens `[begin + 1, end]`, of which those from
    `first + 1` on count.
    """
    counted = begin = 0
    while counted < tokens - 1:
        end = min(begin + context, tokens - 1)
        yield begin, end, counted
        counted = end
        begin += stride


def evaluate_perplexity(
    model: str,
    files: Sequence[str],
    *,
    reference_tokenizer: str | None = None,
    key: str = "text",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    dtype: Dtype | None = None,
    ckpt_step: int | None = None,
    load_hf: str | None = None,
    trust_remote_code: bool = False,
    on_document: Callable[[str, int], None] | None = None,
) -> PerplexityReport:
    """Evaluate a model on corpora, one domain a file, named as the file without its suffixes.

    Every rank of `torch.distributed` calls this, if it is up, and gets the same report; documents
    are dealt out to the ranks.

    Args:
        model: a Hugging Face folder, or the `--save` folder of a run, whose checkpoint is exported
            to a temporary folder first.
        files: see `corpora.expand`.
        reference_tokenizer: folder of a Hugging Face tokenizer; the model's own by default.
        key: of the text in JSON lines.
        context: tokens of a window; by default the model's longest sequence, at most 4096.
        stride: tokens from one window to the next; `context` by default, without overlap.
        batch_size: windows at a time on each rank.
        dtype: of the computation; by default float32 on the CPU and the stored type on a GPU.
        ckpt_step: iteration of a run's checkpoint, by default the latest.
        load_hf: folder that a run began with, where it is not where it was: `convert`'s `source`.
        trust_remote_code: run the code that a Hugging Face folder comes with.
        on_document: called on this rank with the domain and the bytes read since the last call.

    Raises ValueError (`RanksStopped`, on all ranks, with several) that names the file: one that is
    missing or damaged, a bad record, a domain without a token or given twice.
    """
    with ranks_agree("looking for the files"):
        if batch_size < 1:
            raise ValueError(f"--batch-size is {batch_size}; valid: at least 1")
        domains = _domains(files)
    with ranks_agree("reading the files"):
        # A bad record at the end of the last file is not to throw away all that was evaluated.
        rank, ranks = _rank_of()
        for path in domains.values():
            # Every rank goes through every file, so that none waits long for another.
            for number, chunk in enumerate(read_chunks(path, keys=[key])):
                if number % ranks == rank:
                    for _ in _records(chunk, key):
                        pass
    with _hugging_face_folder(model, ckpt_step, load_hf, trust_remote_code) as folder:
        with ranks_agree("loading the model"):
            network, tokenizer = _load(folder, dtype, trust_remote_code)
            reference: Tokenizer = tokenizer
            if reference_tokenizer is not None:
                reference = HuggingFaceTokenizer(
                    reference_tokenizer, trust_remote_code=trust_remote_code
                )
            context, stride = _window_sizes(network.config, context, stride)
        evaluation = _Evaluation(network, tokenizer, reference, context, stride, batch_size)
        results = {}
        for name, path in domains.items():
            with ranks_agree(f"evaluating {path}"):
                counts = evaluation.run(name, path, key, on_document)
            if dist.is_initialized():
                dist.all_reduce(counts)
            with ranks_agree(f"evaluating {path}"):
                results[name] = _result(counts, path)
    return PerplexityReport(
        model=model,
        reference_tokenizer=reference_tokenizer or model,
        context=context,
        stride=stride,
        domains=results,
    )


def _rank_of() -> tuple[int, int]:
    """This rank, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _records(chunk: Chunk, key: str) -> Iterator[Record]:
    for record in decode(chunk, [key]):
        if isinstance(record, BadRecord):
            raise ValueError(record.describe(chunk))
        yield record


def _domains(files: Sequence[str]) -> dict[str, str]:
    domains: dict[str, str] = {}
    for path in expand(files, flag="--data"):
        name = Path(path).name.partition(".")[0]
        if name in domains:
            raise ValueError(f"--data: {path} and {domains[name]} are both domain {name!r}")
        domains[name] = path
    return domains


def _window_sizes(config: Any, context: int | None, stride: int | None) -> tuple[int, int]:
    longest: int = config.max_position_embeddings
    context = min(longest, LONGEST_CONTEXT) if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(f"--seq-length is {context}; valid: 1 to the model's {longest}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; valid: 1 to the window's {context} tokens")
    return context, stride


@contextlib.contextmanager
def _hugging_face_folder(
    model: str, ckpt_step: int | None, load_hf: str | None, trust_remote_code: bool
) -> Iterator[str]:
    """The folder itself, or a run's checkpoint exported for as long as the block runs."""
    several = dist.is_initialized()
    first = not several or dist.get_rank() == 0
    with contextlib.ExitStack() as stack:
        folders = [model]
        with ranks_agree(f"reading {model}"):
            if not Path(model).is_dir():
                raise ValueError(f"--model: {model} is not a folder")
            signs = ("latest", "global_step*")
            is_run = any(any(Path(model).glob(sign)) for sign in signs) or ckpt_step is not None
            if load_hf is not None and not is_run:
                raise ValueError(f"--load-hf is for a run's checkpoint; --model {model} is none")
            if is_run and first:
                # DeepSpeed and all that: only where it is needed.
                from megatron_sat.checkpoint.convert import convert
                from megatron_sat.training.search import find_checkpoint

                parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="perplexity-"))
                stored = find_checkpoint(model, iteration=ckpt_step)
                target = Path(parent) / "model"
                convert(stored, target, source=load_hf, trust_remote_code=trust_remote_code)
                folders = [str(target)]
        if several:
            dist.broadcast_object_list(folders)
        yield folders[0]
        if several:
            dist.barrier()  # before the folder goes


def _load(
    folder: str, dtype: Dtype | None, trust_remote_code: bool
) -> tuple[Any, HuggingFaceTokenizer]:
    from transformers import AutoModelForCausalLM

    tokenizer = HuggingFaceTokenizer(folder, trust_remote_code=trust_remote_code)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    stored: Any = "auto" if device.type == "cuda" else torch.float32
    HFReader(folder)  # names the file and the tensor that are missing or damaged
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=stored if dtype is None else getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises whatever the broken folder provokes
        raise ValueError(f"--model: {folder} cannot be loaded ({reason(error)})") from error
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise ValueError(f"--model: {folder} has no tensor {min(loading['missing_keys'])}")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"--model: {folder} has {rows} embedding rows and a tokenizer of "
            f"{tokenizer.vocab_size} tokens"
        )
    return model.eval().to(device), tokenizer


def _result(counts: Tensor, path: str) -> DomainResult:
    documents, characters, tokens, reference_tokens, total_loss = counts.tolist()
    if not tokens or not reference_tokens:
        raise ValueError(f"--data: {path} has no document with a token")
    return DomainResult(
        int(documents), int(characters), int(tokens), int(reference_tokens), total_loss
    )


@dataclass
class _Evaluation:
    model: Any
    tokenizer: HuggingFaceTokenizer
    reference: Tokenizer
    context: int
    stride: int
    batch_size: int

    def run(
        self, name: str, path: str, key: str, on_document: Callable[[str, int], None] | None
    ) -> Tensor:
        """This rank's share of a domain: documents, characters, tokens, reference tokens, loss."""
        rank, ranks = _rank_of()
        counts = torch.zeros(5, dtype=torch.float64)
        waiting: list[tuple[list[int], int]] = []
        number = 0
        for chunk in read_chunks(path, keys=[key]):
            for record in _records(chunk, key):
                number += 1
                if number % ranks != rank:
                    continue
                (text,) = record.texts
                try:
                    ids, reference = self.tokenizer.tokenize(text), self.reference.tokenize(text)
                except ValueError as error:
                    raise ValueError(f"{place(chunk, record.number)}: {error}") from error
                if not ids:
                    continue
                counts[:4] += torch.tensor([1, len(text), len(ids), len(reference)])
                ids = [self.tokenizer.start, *ids]
                for begin, end, first in windows(
                    len(ids), context=self.context, stride=self.stride
                ):
                    waiting.append((ids[begin : end + 1], first - begin))
                if len(waiting) >= self.batch_size * _SORTED_BATCHES:
                    counts[4] += self._loss(waiting)
                    waiting = []
            if on_document is not None:
                on_document(name, chunk.bytes_done)
        counts[4] += self._loss(waiting)
        return counts

    def _loss(self, pieces: list[tuple[list[int], int]]) -> float:
        """The total loss of windows, given as their tokens and the labels not to count."""
        pieces.sort(key=lambda piece: len(piece[0]))  # little padding in a batch
        return sum(
            self._batch_loss(pieces[i : i + self.batch_size])
            for i in range(0, len(pieces), self.batch_size)
        )

    @torch.no_grad()
    def _batch_loss(self, pieces: list[tuple[list[int], int]]) -> float:
        longest = max(len(ids) for ids, _ in pieces) - 1
        shape = (len(pieces), longest)
        # Padding stands behind what is read, where a causal model does not look: no mask.
        inputs, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (ids, uncounted) in enumerate(pieces):
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, uncounted : len(ids) - 1] = torch.tensor(ids[1 + uncounted :])
        device = self.model.device
        logits = self.model(inputs.to(device), use_cache=False).logits
        labels = labels.to(device)
        total = 0.0
        # In float32 the logits of all positions at once may be gigabytes.
        for begin in range(0, longest, _LOSS_POSITIONS):
            part = slice(begin, begin + _LOSS_POSITIONS)
            losses = F.cross_entropy(
                logits[:, part].flatten(0, 1).float(), labels[:, part].flatten(), reduction="none"
            )
            total += float(losses.double().sum())
        return total
