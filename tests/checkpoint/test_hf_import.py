"""What a rank reads of a folder, and what it holds while it does, as the system counts them."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_sat.testing.huggingface import build_model, write_tokenizer
from megatron_sat.testing.training import run_training
from tests.training.offloading import plain_offloading

# Embedding and output have 30 MiB each, far more than the blocks that are read at once; attention's
# inner size is 384, so that rows of row-parallel weights are not those of the others.
CHANGES = {"vocab_size": 65536, "hidden_size": 240, "intermediate_size": 704, "head_dim": 64}
LARGEST = 65536 * 240 * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    build_model("llama3", changes=CHANGES).bfloat16().save_pretrained(path)
    return write_tokenizer(path)


def bytes_read() -> int:
    """By this process so far, whatever call it used."""
    return int(Path("/proc/self/io").read_text().split()[1])


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def start(argv: list[str]) -> tuple[Any, Any]:
    """A model and the weights for it. On all ranks."""
    from megatron.core import parallel_state

    from megatron_sat.state import SATState
    from megatron_sat.training.arguments import parse_args
    from megatron_sat.training.deepspeed_config import build_deepspeed_config
    from megatron_sat.training.hf import open_weights
    from megatron_sat.training.initialize import initialize
    from megatron_sat.training.model import build_model

    parallel_state.destroy_model_parallel()
    config = parse_args(argv)
    initialize(config)
    settings = build_deepspeed_config(config, world_size=torch.distributed.get_world_size())
    model = build_model(config, SATState(None), padded_vocab=65536, deepspeed_config=settings)
    return model, open_weights(config, padded_vocab=65536)


def load(argv: list[str]) -> dict[str, int]:
    """On all ranks. Bytes that were read, bytes of the rank's parameters, and bytes that were held
    beside them."""
    from megatron_sat.training.hf import load_weights

    model, weights = start(argv)
    own = sum(getattr(p, "ds_tensor", p).nbytes for p in model.parameters())
    for parameter in model.parameters():
        getattr(parameter, "ds_tensor", parameter).data.zero_()  # takes its memory now
    held, stop, before = [0], threading.Event(), resident()

    def watch() -> None:
        while not stop.wait(0.001):
            held[0] = max(held[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_weights(model, weights)
    stop.set()
    watcher.join()
    before = bytes_read()
    load_weights(model, weights)
    read = bytes_read() - before
    return {"read": read, "own": own, "held": held[0]}


def flags(folder: Path, more: str) -> list[str]:
    return (
        f"--load-hf {folder} --seq-length 32 --train-data-path none --micro-batch-size 1 "
        f"--train-iters 1 --lr 0.1 --bf16 {more}"
    ).split()


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "zero_stage"), [(4, 2, 3), (2, 2, 0), (1, 1, 3)]
)
def test_a_rank_reads_and_holds_no_more_than_it_keeps(
    folder: Path, ranks: int, tensor_parallel: int, zero_stage: int
) -> None:
    argv = flags(
        folder, f"--tensor-model-parallel-size {tensor_parallel} --zero-stage {zero_stage}"
    )
    results = run_training(load, ranks, argv)
    whole = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    row, parameters = 704 * 2, 2 * 6 + 3
    for result in results:
        # A partition may begin and end within a row.
        assert result["read"] <= result["own"] + 2 * row * parameters
        assert result["held"] < LARGEST
    assert sum(result["read"] for result in results) >= whole


def load_on_nvme(argv: list[str]) -> tuple[int, list[int], bool]:
    """How many parameters are there, how often each was written, and whether they are the
    folder's."""
    from megatron_sat.checkpoint.parts import is_on_nvme, own_part
    from megatron_sat.training.hf import load_weights

    with plain_offloading():
        model, weights = start(argv)
        swapped = {p.ds_id: p for p in model.parameters() if is_on_nvme(p)}
        swapper = next(iter(swapped.values())).nvme_swapper
        write = mock.Mock(wraps=swapper.swap_out_and_release)
        with mock.patch.object(swapper, "swap_out_and_release", write):
            load_weights(model, weights)
        written = [parameter.ds_id for ((parameter,),), _ in write.call_args_list]
        rows = load_file(weights.reader.folder / "model.safetensors")["model.embed_tokens.weight"]
        embedding = model.embedding.word_embeddings.weight
        # More often than there are buffers, which an error is to give back.
        for _ in range(6):
            with contextlib.suppress(OSError), own_part(embedding) as part:
                part.zero_()
                raise OSError
        with own_part(embedding, write=False) as part:
            same = torch.equal(part, rows.flatten())
    return len(swapped), [written.count(name) for name in swapped], same


def test_what_is_on_nvme_is_written_once_and_not_at_all_where_that_fails(
    folder: Path, tmp_path: Path
) -> None:
    buffers = {"buffer_size": LARGEST // 2, "max_in_cpu": 0}
    place = {"device": "nvme", "nvme_path": str(tmp_path)} | buffers
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"offload_param": place}}))
    argv = flags(folder, f"--deepspeed_config {settings}")
    ((swapped, writes, same),) = run_training(load_on_nvme, 1, argv)
    assert swapped == 2 and writes == [1, 1] and same
