#!/usr/bin/env python
"""How fast, and in how much memory, ranks load a Hugging Face folder.

    python benchmarks/load_hf.py --output benchmarks/results/load_hf.csv

Writes a random Llama of the given size in bfloat16, loads it as `--load-hf` does into the
parameters of one tensor-parallel size, and writes a CSV line: the disk's plain read speed of the
same files, the loading speed, and the peak host memory of a rank, its parameters included, against
its shard and the largest tensor. The files leave the system's cache before each reading, so that
the disk is measured. Plain reading and loading take turns; the best of `--repeats` counts, as other
work on the machine only ever slows down.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# So that the benchmark also runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from megatron_sat.checkpoint.families import LLAMA, dims
from megatron_sat.checkpoint.hf_config import config_json, read_hf_config
from megatron_sat.checkpoint.hf_import import HFWeights
from megatron_sat.checkpoint.hf_reader import HFReader
from megatron_sat.training.config import ModelConfig

MIB = 2**20
FIELDS = [
    "date",
    "machine",
    "tensor_parallel",
    "model_gb",
    "plain_read_gb_per_s",
    "load_gb_per_s",
    "share_of_plain_read",
    "shard_mib",
    "largest_tensor_mib",
    "peak_mib",
]


def write_folder(folder: Path, layers: int, hidden: int) -> None:
    """A Llama with the proportions of Llama 2 7B, in files of at most 1 GB."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 43 // 16,
        num_attention_heads=hidden // 128,
        num_query_groups=hidden // 128,
        kv_channels=128,
        seq_length=2048,
        max_position_embeddings=2048,
        untie_embeddings_and_output_weights=True,
        vocab_size=32000,
    )
    config = config_json(model, dtype="bfloat16", source=None, tokens={})
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    sizes = dims(model, padded_vocabulary=32000)

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for _, named in LLAMA.parameters(model):
        for name, shape in named.source_shapes(sizes).items():
            pending[name] = torch.randn(shape, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in pending.values()) > 10**9:
            flush()
    if pending:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def forget(folder: Path) -> None:
    """Let the system drop the files from its cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: Path) -> float:
    """Seconds for reading all files once, front to back."""
    buffer = bytearray(16 * MIB)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches `resident` until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.002):
            self.peak = max(self.peak, resident())

    def stop(self) -> int:
        self._stop_asked.set()
        self.join()
        return max(self.peak, resident()) - self.before


class Parameters(torch.nn.Module):
    """A rank's parameters under the names of our model, without its layers."""

    def __init__(self, weights: HFWeights, rank: int, size: int) -> None:
        super().__init__()
        sizes = dims(weights.model, padded_vocabulary=weights.padded_vocabulary)
        self._values = {
            name: torch.nn.Parameter(
                torch.ones(named.layout.local_shape(sizes, rank, size), dtype=torch.bfloat16),
                requires_grad=False,
            )
            for name, named in weights.family.parameters(weights.model)
        }

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return iter(self._values.items())

    def nbytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())


def load_rank(rank: int, folder: Path, size: int, results: Any) -> None:
    """One rank, in a process of its own."""
    torch.set_num_threads(1)
    source = read_hf_config(folder)
    weights = HFWeights(
        reader=HFReader(folder),
        family=source.family,
        model=source.model(),
        padded_vocabulary=32000,
    )
    parameters = Parameters(weights, rank, size)
    watch = Peak()
    watch.start()
    start = time.perf_counter()
    weights.load(parameters, rank=rank, size=size)
    end = time.perf_counter()
    results.put((start, end, parameters.nbytes(), parameters.nbytes() + watch.stop()))


def load(folder: Path, size: int) -> tuple[float, int, int]:
    """Seconds, largest shard and highest peak, on `size` tensor-parallel ranks at once."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=load_rank, args=(rank, folder, size, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    starts, ends, shards, peaks = zip(*[results.get() for _ in ranks], strict=True)
    for process in ranks:
        process.join()
    return max(ends) - min(starts), max(shards), max(peaks)


def measure(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """Plain reading and loading in turns."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    shapes = HFReader(folder).shapes.values()
    plain, loads = [], []
    for _ in range(repeats):
        forget(folder)
        plain.append(plain_read(folder))
        forget(folder)
        loads.append(load(folder, size))
    fastest = min(seconds for seconds, _, _ in loads)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {processor()}",
        "tensor_parallel": size,
        "model_gb": round(total / 1e9, 2),
        "plain_read_gb_per_s": round(total / min(plain) / 1e9, 2),
        "load_gb_per_s": round(total / fastest / 1e9, 2),
        "share_of_plain_read": round(min(plain) / fastest, 2),
        "shard_mib": loads[0][1] // MIB,
        "largest_tensor_mib": max(torch.Size(shape).numel() for shape in shapes) * 2 // MIB,
        "peak_mib": max(peak for _, _, peak in loads) // MIB,
    }


def processor() -> str:
    """Its name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2], help="sizes")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--folder", default=None, help="where to write (default: the system's)")
    parser.add_argument("--output", help="CSV file (default: the terminal)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        write_folder(Path(place), args.layers, args.hidden_size)
        rows = [measure(Path(place), size, args.repeats) for size in args.tensor_parallel]
    with open(args.output, "w", newline="") if args.output else sys.stdout as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
