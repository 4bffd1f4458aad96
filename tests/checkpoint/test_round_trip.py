"""From a folder to ranks and back without training: nothing may change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sat.checkpoint.hf_config import read_hf_config
from megatron_sat.checkpoint.hf_export import HFExport, HFWriter
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import run_training
from megatron_sat.training.config import DataConfig


def load_and_save(argv: list[str], *, max_shard_bytes: int | None = None) -> None:
    """On all ranks."""
    from megatron.core import parallel_state

    from megatron_sat.state import SATState
    from megatron_sat.training.arguments import parse_args
    from megatron_sat.training.deepspeed_config import build_deepspeed_config
    from megatron_sat.training.hf import export, load_weights, open_weights, plan_export
    from megatron_sat.training.initialize import initialize
    from megatron_sat.training.model import build_engine, build_model, padded_vocab_size

    parallel_state.destroy_model_parallel()
    config = parse_args(argv)
    initialize(config)
    padded = padded_vocab_size(
        config.model.vocab_size,
        divisible_by=16,
        tensor_parallel=config.parallel.tensor_model_parallel_size,
    )
    settings = build_deepspeed_config(config, world_size=torch.distributed.get_world_size())
    model = build_model(config, SATState(None), padded_vocab=padded, deepspeed_config=settings)
    weights = open_weights(config, padded_vocab=padded)
    load_weights(model, weights)
    engine = build_engine(model, config, deepspeed_config=settings)
    plan = plan_export(config, padded_vocab=padded)
    if max_shard_bytes is not None:
        plan = replace(plan, max_shard_bytes=max_shard_bytes)
    export(engine, plan)


def flags(folder: Path, out: Path, *, tensor_parallel: int, zero_stage: int) -> list[str]:
    return (
        f"--load-hf {folder} --save-hf {out} --seq-length 32 --make-vocab-size-divisible-by 16 "
        f"--train-data-path none --micro-batch-size 1 --train-iters 1 --lr 0.1 "
        f"--tensor-model-parallel-size {tensor_parallel} --zero-stage {zero_stage}"
    ).split()


@pytest.mark.parametrize(
    ("case", "tensor_parallel", "zero_stage", "bf16"),
    [
        ("qwen2", 2, 3, True),
        ("llama3.1", 1, 3, False),
        ("qwen3", 2, 1, True),
        ("mistral", 2, 0, True),
    ],
)
def test_every_file_comes_back_to_the_byte(
    tmp_path: Path, case: str, tensor_parallel: int, zero_stage: int, bf16: bool
) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    folder = write_tokenizer(write_model(tmp_path / "in", case, dtype=dtype))
    out = tmp_path / "out"
    argv = flags(folder, out, tensor_parallel=tensor_parallel, zero_stage=zero_stage)
    run_training(load_and_save, 2, argv + (["--bf16"] if bf16 else []))
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= set(names)
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    # All of it for the same readers: safetensors writes for its owner alone.
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_and_written(tmp_path: Path, kind: str) -> None:
    folder = write_tokenizer(write_model(tmp_path / "in", "qwen3-tied", max_shard_size="60KB"))
    reader = HFReader(folder)
    weights = {name: reader.read(name, rows=(0, shape[0])) for name, shape in reader.shapes.items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    if kind == "bin":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        names = sorted(weights)
        files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in files.items():
            # The first in the format of old checkpoints, which cannot be mapped into memory.
            torch.save(
                {name: weights[name] for name in part},
                folder / file,
                _use_new_zipfile_serialization=file.endswith("2.bin"),
            )
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = tmp_path / "out"
    argv = flags(folder, out, tensor_parallel=2, zero_stage=3)
    run_training(load_and_save, 2, argv, max_shard_bytes=60_000)
    saved = json.loads((out / "model.safetensors.index.json").read_text())
    assert saved["metadata"] == index["metadata"]
    assert saved["weight_map"].keys() == index["weight_map"].keys()
    files_written = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(saved["weight_map"].values())) == files_written
    assert len(files_written) > 2
    for file in files_written:
        tensors = load_file(out / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000
        for name, tensor in tensors.items():
            assert saved["weight_map"][name] == file
            assert torch.equal(tensor, weights[name])

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.state_dict()["model.norm.weight"], weights["model.norm.weight"])
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids


def test_a_sentencepiece_tokenizer_goes_along(tmp_path: Path) -> None:
    """Of a model from scratch, which has no folder to copy one from."""
    import sentencepiece
    from transformers import AutoTokenizer

    lines = Path(__file__).read_text().splitlines()
    path = tmp_path / "pieces.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = read_hf_config(write_model(tmp_path / "in", "qwen3")).model()
    plan = HFExport(
        target=tmp_path / "out",
        model=replace(model, vocab_size=400),
        padded_vocabulary=400,
        dtype="bfloat16",
        data=DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path)),
        source=None,
    )
    with HFWriter(plan) as writer:
        for _, named in plan.parameters():
            for name, shape in named.source_shapes(plan.dims).items():
                writer.add(name, torch.zeros(shape))
    tokenizer = AutoTokenizer.from_pretrained(plan.target)
    for text in ["def f(x): return  x + 1\n", "Grüße, 你好", "x", *lines[:50]]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == pieces.encode_as_ids(text) or text.startswith(" ")
    assert tokenizer.eos_token_id == pieces.eos_id()
    assert json.loads((plan.target / "generation_config.json").read_text()) == {
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
    }
    assert json.loads((plan.target / "config.json").read_text())["vocab_size"] == 400
