"""The command line of `tools/convert_checkpoint.py`: a run's checkpoint to a Hugging Face folder,
and the proof that both compute the same. Runs on one machine without a GPU."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sat.bad_input import one_line
from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights
from megatron_sat.checkpoint.hf_config import HFConfig, read_hf_config
from megatron_sat.checkpoint.hf_export import MAX_SHARD_BYTES, HFExport, HFWriter
from megatron_sat.checkpoint.verify import Verification, verify
from megatron_sat.training.checkpoint import StoredCheckpoint
from megatron_sat.training.config import DataConfig, HFDtype, TrainingConfig
from megatron_sat.training.hf import default_dtype
from megatron_sat.training.search import find_checkpoint
from megatron_sat.training.tokenizer import build_tokenizer

_TEXT = "The quick brown fox jumps over the lazy dog. 1 2 3, and so on."


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, verify, or both, as the command line says; the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def convert(
    stored: StoredCheckpoint,
    target: str | Path,
    *,
    dtype: HFDtype | None = None,
    source: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Path:
    """Write the model of a checkpoint to the Hugging Face folder `target`.

    Args:
        stored: `find_checkpoint`'s.
        target: The folder; it must not exist.
        dtype: Type of the weights; None: as `--save-hf` chooses.
        source: Folder whose config.json and generation config are taken, and its tokenizer where
            the run's is gone or was its `--load-hf` folder's; None: the run's `--load-hf`, or what
            the run's own settings say.
        max_shard_bytes: Largest weights file.
        trust_remote_code: Run the code that the run's Hugging Face tokenizer comes with.

    Returns: `target`.

    Raises: ValueError, naming file and tensor, for what cannot be read or written.
    """
    config = stored.config
    description = _source(config, source)
    if config.model.vocab_size is None:
        raise ValueError(f"{stored.folder} does not say its vocabulary's size")
    export = HFExport(
        target=Path(target),
        model=config.model,
        padded_vocabulary=stored.run_state["padded_vocab_size"],
        dtype=dtype or default_dtype(config, description),
        data=_tokenizer(stored, source, trust_remote_code),
        source=description,
        max_shard_bytes=max_shard_bytes,
        trust_remote_code=trust_remote_code,
    )
    weights = DeepSpeedWeights(stored)
    try:
        with HFWriter(export) as writer:
            for name, named in export.parameters():
                for tensor_name, tensor in named.assemble(export.dims, weights.shards(name)):
                    writer.add(tensor_name, tensor)
    except OSError as error:
        raise ValueError(f"--save-hf {target} cannot be written ({error})") from error
    return export.target


def _source(config: TrainingConfig, given: str | Path | None) -> HFConfig | None:
    folder = given or config.checkpoint.load_hf
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(
            f"the run's --load-hf {folder} is gone; give the folder whose config.json and "
            "tokenizer to take with --load-hf"
        )
    return read_hf_config(folder)


def _tokenizer(
    stored: StoredCheckpoint, given: str | Path | None, trust_remote_code: bool
) -> DataConfig:
    """The run's data settings, naming the tokenizer that goes out; it has been read."""
    run, data = stored.config, stored.config.data
    if data.tokenizer_type == "NullTokenizer":
        return data
    assert data.tokenizer_model is not None
    own = Path(data.tokenizer_model)
    gone = not own.exists()
    base = run.checkpoint.load_hf
    if given is not None and (gone or (base is not None and own == Path(base))):
        data = replace(data, tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(given))
    elif gone:
        raise ValueError(
            f"the run's --tokenizer-model {own} is gone; give a folder that has its tokenizer "
            "with --load-hf"
        )
    tokenizer = build_tokenizer(
        data.tokenizer_type, data.tokenizer_model, trust_remote_code=trust_remote_code
    )
    rows = run.model.vocab_size
    if rows is not None and tokenizer.vocab_size > rows:
        raise ValueError(
            f"{stored.folder} has a vocabulary of {rows}, but the tokenizer {tokenizer.path} has "
            f"{tokenizer.vocab_size} tokens; they do not belong together"
        )
    return data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a run's checkpoint as a Hugging Face folder, and compare both.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--load", metavar="DIR", help="--save folder of a run")
    add("--ckpt-step", type=int, help="iteration of the checkpoint (default: the latest)")
    add("--save-hf", metavar="DIR", help="Hugging Face folder to write")
    add("--save-hf-dtype", choices=("bfloat16", "float32"), help="type of its weights")
    add(
        "--load-hf",
        metavar="DIR",
        help="with --load: folder whose config.json to take, and its tokenizer where the run's is "
        "gone or was its --load-hf folder's (default: the run's); alone: folder to verify as "
        "training reads it",
    )
    add(
        "--max-shard-size",
        type=float,
        default=MAX_SHARD_BYTES / 1e9,
        metavar="GB",
        help="largest weights file (default: %(default)g)",
    )
    add(
        "--verify",
        nargs="?",
        const="",
        metavar="DIR",
        help="compare the logits of a Hugging Face folder (default: the one written, or "
        "--load-hf) with ours; exit code 1 if they differ",
    )
    add("--tolerance", type=float, default=1e-3, help="of --verify (default: %(default)g)")
    add("--text", default=_TEXT, help="what --verify computes logits of")
    add("--text-file", metavar="FILE", help="file with that text")
    add(
        "--tensor-model-parallel-size",
        type=int,
        default=1,
        help="how --verify cuts --load-hf (a checkpoint is read as its run cut it)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that a tokenizer's or a model's folder holds (default: off)",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.load is None and (args.load_hf is None or args.save_hf is not None):
        raise ValueError("give --load, the --save folder of a run, or --load-hf with --verify")
    if args.save_hf is None and args.verify is None:
        raise ValueError("nothing to do: give --save-hf, --verify or both")
    if not 0 < args.max_shard_size < math.inf:
        raise ValueError(f"--max-shard-size is {args.max_shard_size}; valid: above 0")
    if not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance is {args.tolerance}; valid: at least 0")
    if args.tensor_model_parallel_size < 1:
        raise ValueError(
            f"--tensor-model-parallel-size is {args.tensor_model_parallel_size}; valid: at least 1"
        )
    text = args.text
    if args.text_file is not None:
        try:
            text = Path(args.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text-file {args.text_file} cannot be read ({error})") from error
    stored = None
    if args.load is not None:
        stored = find_checkpoint(args.load, iteration=args.ckpt_step)
    if stored is not None and args.save_hf is not None:
        convert(
            stored,
            args.save_hf,
            dtype=args.save_hf_dtype,
            source=args.load_hf,
            max_shard_bytes=int(args.max_shard_size * 1e9),
            trust_remote_code=args.trust_remote_code,
        )
        print(f"wrote {args.save_hf} from {stored.folder}")
    if args.verify is None:
        return 0
    folder = args.verify or args.save_hf or (args.load_hf if stored is None else None)
    if folder is None:
        raise ValueError("--verify needs a folder to compare the checkpoint with")
    result = verify(
        folder,
        text,
        stored=stored,
        tensor_parallel=args.tensor_model_parallel_size,
        trust_remote_code=args.trust_remote_code,
    )
    return _report(result, args.tolerance)


def _report(result: Verification, tolerance: float) -> int:
    equal = result.largest_difference <= tolerance
    print(
        f"{result.tokens} tokens: the largest difference of a logit is "
        f"{result.largest_difference:.3g} (logits up to {result.largest_logit:.3g}; loss "
        f"{result.ours:.6f} here, {result.theirs:.6f} in transformers)"
    )
    verdict = "equal within" if equal else "DIFFERENT, above"
    print(f"{verdict} the tolerance of {tolerance:g}")
    return 0 if equal else 1
