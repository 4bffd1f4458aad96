"""Hypothesis strategies that draw cases as `corpus.jsonl` holds them, without what is to be said.

Each takes a valid input and draws something that may be wrong with it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_sat.training.flags import build_parser

Case = dict[str, Any]

NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "2147483647", "2147483648", "9223372036854775808", "1" * 400),
    *("nan", "inf", "-inf", "1e400", "1e308", "1e-320", "-0.0", "0.5", "1e3", "0x10", "1_0", "٣"),
    *("", " ", "true", "None", "auto", "1,2", "[1]", "1;2", "--", "%s", "é", "\udcff", "\n"),
]
"""As a command line has them."""
JSON_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**400, 0.5, -0.5, 1e308, float("nan")),
    *(float("inf"), "", "0", "1", "true", "auto", "cpu", "é", "../x", "/etc/passwd", [], [1]),
    *({}, {"a": 1}, [[]], {"enabled": True}, {"enabled": "yes"}, ["x", None]),
]
_FOLDERS = {"--save", "--load", "--tensorboard-dir", "--data-cache-path", "--save-hf"}
# Sizes that are valid and larger than any machine: what they do is not told while parsing.
_NEVER = {"-h", "--help", "--wandb-project", "--wandb-exp-name", "--sat-autotune"}


def arguments(inputs: Path) -> st.SearchStrategy[Case]:
    """One or two flags of the trainer with values that are odd for them."""
    parser = build_parser()
    actions = [a for a in parser._actions if not _NEVER & set(a.option_strings)]
    return st.lists(st.sampled_from(actions).flatmap(_flag), min_size=1, max_size=2).map(
        lambda flags: {"command": "train", "flags": [part for flag in flags for part in flag]}
    )


def _flag(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    name = action.option_strings[0]
    if action.nargs == 0:
        return st.sampled_from([[name], [f"{name}=1"]])
    if name in _FOLDERS:
        return st.sampled_from(["", "/proc/x", "{}/deepspeed.json", "x" * 300, "{}/data"]).map(
            lambda path: [name, path]
        )
    value = st.sampled_from([*NUMBERS, *map(str, action.choices or ())]) | st.text(
        max_size=4
    ).filter(lambda text: "\0" not in text)
    count = {"+": 4, "?": 1}.get(str(action.nargs), 1)
    return st.lists(value, min_size=count == 1, max_size=count).map(lambda values: [name, *values])


def json_values() -> st.SearchStrategy[Any]:
    return st.sampled_from(JSON_VALUES) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
        ),
        max_leaves=4,
    )


DEEPSPEED = [
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "bf16", "bf16.enabled", "bfloat16", "bfloat16.enabled", "fp16"),
    *("fp16.enabled", "zero_optimization", "zero_optimization.stage", "steps_per_print"),
    *("zero_optimization.reduce_bucket_size", "zero_optimization.offload_optimizer"),
    *("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param"),
    *("zero_optimization.leaf_module", "zero_optimization.leaf_module.classes", "data_types"),
    *("zero_optimization.overlap_comm", "zero_optimization.stage3_prefetch_bucket_size"),
    *("zero_optimization.zero_quantized_weights", "data_types.grad_accum_dtype", "optimizer"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "amp"),
    *("wall_clock_breakdown", "flops_profiler", "flops_profiler.profile_step", "aio", "checkpoint"),
    *("aio.block_size", "checkpoint.tag_validation", "comms_logger", "tensorboard", "wandb"),
    *("csv_monitor", "elasticity", "compile", "compile.deepcompile", "hybrid_engine", "pipeline"),
    *(
        "data_efficiency",
        "curriculum_learning",
        "sparse_gradients",
        "zero_allow_untested_optimizer",
    ),
    *("zero_force_ds_cpu_optimizer", "dump_state", "seed", "disable_allgather", "sparse_attention"),
    *("gradient_allreduce_op", "memory_breakdown", "dataloader_drop_last", "timers", "autotuning"),
    *("eigenvalue", "progressive_layer_drop", "compression_training", "weight_quantization"),
    *("use_node_local_storage", "zero_optimisation", "", "a.b", "expert_parallel", "log_level"),
]


def deepspeed(inputs: Path) -> st.SearchStrategy[Case]:
    """A JSON of DeepSpeed with up to two odd fields, or a damaged file."""
    fields = st.lists(st.tuples(st.sampled_from(DEEPSPEED), json_values()), min_size=1, max_size=2)
    name = "deepspeed.json"
    edits_of = fields.map(_nested).map(lambda user: [["text", json.dumps(user)]])
    flags = ["--deepspeed_config", "{}/" + name]
    edits = st.integers(0, 9).flatmap(lambda kind: {0: _bytes(), 1: _texts()}.get(kind, edits_of))
    return edits.map(lambda edits: {"command": "train", "flags": flags, "edits": {name: edits}})


def _nested(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in fields:
        *sections, name = path.split(".")
        target = result
        for section in sections:
            inner = target.setdefault(section, {})
            target = inner if isinstance(inner, dict) else target
        target[name] = value
    return result


def _hexadecimal(max_size: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=1, max_size=max_size).map(bytes.hex)


def _bytes() -> st.SearchStrategy[list[list[Any]]]:
    """Edits that know nothing of the format."""
    return st.one_of(
        st.integers(-40, 400).map(lambda size: [["truncate", size]]),
        _hexadecimal(8).map(lambda content: [["append", content]]),
        _hexadecimal(60).map(lambda content: [["hex", content]]),
        st.tuples(st.integers(-400, 2000), _hexadecimal(9)).map(lambda at: [["overwrite", *at]]),
        st.sampled_from([[["remove"]], [["folder"]], [["truncate", 0]]]),
    )


def _texts() -> st.SearchStrategy[list[list[Any]]]:
    """Text files that may be JSON."""
    return st.sampled_from(
        [
            *("null", "1", '"x"', "[]", "{}", "[{}]", "{", '{"a": 1, "a": 2}', '{"a": NaN}'),
            *('{"a": 1}{', "\ufeff{}", "'a'", '{"a": -Infinity}', '{"\\ud800": 1}', "9" * 5000),
        ]
    ).map(lambda content: [["text", content]]) | st.just([["nest", 100_000]])


INDEX = "data/numbers.idx"


def data(inputs: Path) -> st.SearchStrategy[Case]:
    """Damage to the two files of a data set of 20 documents."""
    entry = st.tuples(
        st.just("index entry"),
        st.sampled_from(["lengths", "offsets", "ends"]),
        st.integers(0, 20),
        st.sampled_from([-1, 0, 1, 2**31 - 1, -(2**31), 19, 21, 1000]) | st.integers(-100, 3000),
    )
    field = st.tuples(
        st.just("index header"),
        st.sampled_from(["version", "code", "sequences", "ends"]),
        st.integers(0, 30) | st.sampled_from([255]),
    )
    damage = st.one_of(
        st.lists((entry | field).map(list), min_size=1, max_size=2).map(lambda e: {INDEX: e}),
        _bytes().map(lambda edits: {INDEX: edits}),
        _bytes().map(lambda edits: {"data/numbers.bin": edits}),
    )
    return damage.map(lambda edits: {"command": "train", "flags": [], "edits": edits})


def json_file(inputs: Path, name: str) -> st.SearchStrategy[list[list[Any]]]:
    """A value of a JSON file set to another, or deleted; or a file that is no such JSON."""
    keys = list(_paths(json.loads((inputs / name).read_text()), []))
    changed = st.tuples(st.just("set"), st.sampled_from(keys), json_values())
    deleted = st.tuples(st.just("delete"), st.sampled_from([path for path in keys if path]))
    edits = st.lists((changed | deleted).map(list), min_size=1, max_size=1)
    # Others than the first are refused as no JSON at all.
    return st.integers(0, 9).flatmap(lambda kind: {0: _bytes(), 1: _texts()}.get(kind, edits))


def _paths(value: Any, path: list[Any]) -> Any:
    yield path
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, item in items[:40]:
        yield from _paths(item, [*path, key])


def hugging_face(inputs: Path) -> st.SearchStrategy[Case]:
    """A folder whose config.json, index or weights are other than they should be."""
    shard = "hf/model-00002-of-00005.safetensors"
    names = ["hf/config.json", "hf/config.json", "hf/model.safetensors.index.json"]
    files = st.one_of(
        *(json_file(inputs, name).map(lambda e, name=name: {name: e}) for name in names),
        _bytes().map(lambda edits: {shard: edits}),
        tensors(inputs, shard).map(lambda edits: {shard: edits}),
    )
    return files.map(lambda edits: {"command": "train hf", "flags": [], "edits": edits})


def tensors(inputs: Path, name: str) -> st.SearchStrategy[list[list[Any]]]:
    """The header of a safetensors file, changed."""
    data = (inputs / name).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    keys = [path for path in _paths(header, []) if path]
    return st.tuples(
        st.just("tensor header"), st.sampled_from(keys), json_values() | st.just("I8")
    ).map(lambda edit: [list(edit)])


def tokenizers(inputs: Path) -> st.SearchStrategy[Case]:
    """A SentencePiece file or a Hugging Face tokenizer, damaged."""
    pieces = _bytes().map(lambda edits: {"pieces.model": edits})
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "{}/pieces.model"]
    folder = st.one_of(
        *(
            json_file(inputs, f"hf/{name}").map(lambda e, name=name: {f"hf/{name}": e})
            for name in ("tokenizer.json", "tokenizer_config.json")
        )
    )
    other = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{}/hf"]
    return st.one_of(
        pieces.map(lambda edits: {"command": "train", "flags": kind, "edits": edits}),
        folder.map(lambda edits: {"command": "train", "flags": other, "edits": edits}),
    )


def checkpoints(inputs: Path) -> st.SearchStrategy[Case]:
    """A checkpoint, one of whose files is damaged."""
    folder = inputs / "save"
    names = sorted(str(p.relative_to(inputs)) for p in folder.glob("global_step2/*"))
    names.append("save/latest")
    described = [name for name in names if name.endswith(".json")]
    damage = st.one_of(
        st.tuples(st.sampled_from(names), _bytes()),
        *(st.tuples(st.just(name), json_file(inputs, name)) for name in described),
    )
    flags = ["--load", "{}/save"]
    return damage.map(
        lambda item: {"command": "train saved", "flags": flags, "edits": {item[0]: item[1]}}
    )


def tools(inputs: Path) -> st.SearchStrategy[Case]:
    """Arguments and files of the tools."""
    number = st.sampled_from(NUMBERS)
    flags = {
        "preprocess": ["--vocab-size", "--workers", "--json-keys", "--input", "--tokenizer-model"],
        "extend": ["--noise", "--seed", "--init", "--pieces", "--base", "--report-text"],
        "convert": ["--ckpt-step", "--max-shard-size", "--save-hf-dtype", "--load-hf", "--load"],
        "perplexity": ["--seq-length", "--stride", "--batch-size", "--ckpt-step", "--dtype"],
        "blend": ["--part", "--blend", "--tokens"],
    }
    given = st.sampled_from(sorted(flags)).flatmap(
        lambda tool: st.tuples(st.sampled_from(flags[tool]), number).map(
            lambda flag: {"command": tool, "flags": list(flag)}
        )
    )
    base = st.sampled_from(["base", "bytes", "pieces-only"]).flatmap(
        lambda base: st.sampled_from(
            [
                n
                for n in ("tokenizer.json", "tokenizer_config.json", "config.json")
                if (inputs / base / n).exists()
            ]
        ).flatmap(
            lambda name: json_file(inputs, f"{base}/{name}").map(
                lambda edits: {
                    "command": "extend",
                    "flags": ["--base", f"{{}}/{base}"],
                    "edits": {f"{base}/{name}": edits},
                }
            )
        )
    )
    model = _bytes().map(
        lambda edits: {"command": "extend", "edits": {"base/tokenizer.model": edits}}
    )
    texts = st.sampled_from(["lines.jsonl", "lines.jsonl.gz", "rows.parquet"]).flatmap(
        lambda name: _bytes().map(
            lambda edits: {
                "command": "preprocess",
                "flags": ["--strict", "--input", f"{{}}/{name}"],
                "edits": {name: edits},
            }
        )
    )
    return st.one_of(given, base, model, texts)


KINDS = {
    "arguments": arguments,
    "deepspeed": deepspeed,
    "data": data,
    "hugging face": hugging_face,
    "tokenizer": tokenizers,
    "checkpoint": checkpoints,
    "tools": tools,
}
"""A strategy of cases by what they spoil, given the folder of valid inputs."""
