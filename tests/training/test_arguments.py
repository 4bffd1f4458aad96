import json
import os
import re
from dataclasses import fields

import pytest

from megatron_sat.training.arguments import parse_args
from megatron_sat.training.checkpoint_arguments import check_paths
from megatron_sat.training.config import TrainingConfig
from megatron_sat.training.flags import build_parser
from megatron_sat.training.validation import check_sat_layout

DEFAULTS = {
    "num-layers": "2",
    "hidden-size": "64",
    "num-attention-heads": "4",
    "seq-length": "32",
    "micro-batch-size": "2",
    "train-iters": "10",
    "lr": "0.001",
    "data-path": "data",
    "tokenizer-type": "NullTokenizer",
    "vocab-size": "100",
}


def parse(flags: str = "", *, world_size: int = 1, without: str = "") -> TrainingConfig:
    argv = []
    for name, value in DEFAULTS.items():
        if name not in without.split():
            argv += ["--" + name, value]
    return parse_args([*argv, *flags.split()], world_size=world_size)


def test_defaults_are_llamas():
    config = parse()
    model = config.model
    assert (model.normalization, model.swiglu, model.add_bias_linear) == ("RMSNorm", True, False)
    assert (model.num_query_groups, model.kv_channels) == (4, 16)
    assert model.max_position_embeddings == 32
    assert (config.attention_dropout, config.hidden_dropout) == (0.0, 0.0)
    assert config.parallel.zero_stage == 3
    assert config.sat is None
    assert config.global_batch_size == 2
    assert config.data.split == "969,30,1"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--hidden-size 4096 --num-attention-heads 32", 10880),
        ("--hidden-size 4096 --num-attention-heads 32 --no-swiglu", 16384),
        ("--hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008", 11008),
    ],
)
def test_ffn_hidden_size(flags, expected):
    assert parse(flags, without="hidden-size num-attention-heads").model.ffn_hidden_size == expected


def test_model_flags():
    model = parse(
        "--group-query-attention --num-query-groups 2 --kv-channels 32 --norm-epsilon 1e-6 "
        "--rotary-base 500000 --add-qkv-bias --qk-layernorm --disable-bias-linear "
        "--untie-embeddings-and-output-weights --max-position-embeddings 64"
    ).model
    assert (model.num_query_groups, model.kv_channels) == (2, 32)
    assert (model.norm_epsilon, model.rotary_base) == (1e-6, 500000.0)
    assert model.add_qkv_bias and model.qk_layernorm and not model.add_bias_linear
    assert model.untie_embeddings_and_output_weights
    assert parse("--add-bias-linear").model.add_bias_linear


def test_learning_rate_defaults_follow_train_iters():
    assert parse().optimizer.lr_decay_iters == 10
    assert parse("--lr-warmup-fraction 0.25 --lr-decay-iters 8").optimizer.lr_warmup_iters == 2


def test_global_batch_size_counts_data_parallel_ranks():
    assert parse(world_size=8).global_batch_size == 16
    config = parse("--tensor-model-parallel-size 2 --global-batch-size 24", world_size=8)
    assert (config.data_parallel_size(8), config.gradient_accumulation_steps(8)) == (4, 3)


def test_world_size_comes_from_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse(world_size=None).global_batch_size == 8


@pytest.mark.parametrize(
    ("flags", "minutes", "of_groups"),
    [
        ("", 30, 32),
        ("--hang-timeout-minutes 12.1", 73, 75),
        ("--hang-timeout-minutes 1", 10, 12),
        ("--distributed-timeout-minutes 7", 7, 9),
        ("--hang-timeout-minutes 0", 10, 10),
    ],
)
def test_who_is_late_is_named_before_torch_gives_up(flags, minutes, of_groups):
    config = parse(flags)
    assert config.distributed_timeout_minutes == minutes
    assert config.group_timeout_minutes == of_groups


def test_recomputation():
    assert parse("--recompute-activations").parallel.recompute_modules == ("core_attn",)
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    parallel = parse(flags).parallel
    assert (parallel.recompute_granularity, parallel.recompute_num_layers) == ("full", 2)


def test_validation_sets():
    data = parse("--valid-data old=a new=b --valid-data third=c --valid-data-path 1 x 2 y").data
    assert data.valid_data == {
        "valid": ("1", "x", "2", "y"),
        "old": ("a",),
        "new": ("b",),
        "third": ("c",),
    }
    assert data.split == "1,0,0", "other validation sets leave the data to training"
    data = parse("--split 98,2,0 --valid-data old=a").data
    assert (data.split, list(data.valid_data)) == ("98,2,0", ["old"])
    data = parse("--train-data-path a --valid-data-path b", without="data-path").data
    assert (data.data_path, data.train_data_path, data.split) == ((), ("a",), None)


def test_sat_settings():
    sat = parse("--sat-omission-rate 0.5 --train-iters 3000", without="train-iters").sat
    assert (sat.omission_rate, sat.total_steps, sat.decay_start_step) == (0.5, 3000, 2000)


def test_tensorboard_is_beside_the_checkpoints():
    assert parse("--save out").logging.tensorboard_dir == os.path.join("out", "tensorboard")
    assert parse("--save out --tensorboard-dir elsewhere").logging.tensorboard_dir == "elsewhere"
    assert parse().logging.tensorboard_dir is None


def test_help_tells_every_default():
    entries = re.split(r"\n  (?=--)", build_parser().format_help().replace("-\n", "-"))[1:]
    shown = {entry.split()[0].strip(","): " ".join(entry.split()) for entry in entries}
    assert len(shown) > 90
    for flag, text in shown.items():
        assert re.search(r"default: .+\)|default with --load-hf: |\((one .*)?required", text), flag
    for flag, default in {
        "--seed": "1234",
        "--num-workers": "2",
        "--eval-interval": "1000",
        "--weight-decay": "0.01",
        "--sat-temperature": "0.05",
        "--sat-metric": "maxip",
        "--sequence-parallel": "off",
    }.items():
        assert shown[flag].endswith(f"(default: {default})")


def test_what_launchers_pass_is_accepted():
    assert parse("--deepspeed --local_rank 0") == parse("--local-rank=0") == parse()


def test_round_trip_through_json(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"}')
    config = parse(
        f"--deepspeed_config {path} --sat-omission-rate 0.5 --valid-data old=a --bf16 --save out "
        "--recompute-granularity selective --recompute-modules mlp core_attn"
    )
    restored = TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored.parallel) == hash(config.parallel), "tuples are tuples again"
    values = config.to_dict()
    values["model"]["num_experts"] = 8
    with pytest.raises(ValueError, match="ModelConfig has no field num_experts"):
        TrainingConfig.from_dict(values)


def test_architecture_holds_what_decides_shapes():
    names = set(parse().architecture())
    free = {field.name for field in fields(parse().model)} - names
    assert free == {
        "seq_length",
        "max_position_embeddings",
        "init_method_std",
        "make_vocab_size_divisible_by",
        "vocab_size",
    }


GQA = "--num-query-groups 2 "


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr x", r"--lr.*'x'"),
        ("--unknown 1", r"unrecognized arguments: --unknown"),
        ("--num-layer 3", r"unrecognized arguments"),
        ("--bf16 true", r"unrecognized arguments: true"),
        ("--num-layers 0", r"--num-layers is 0; valid: at least 1"),
        ("--num-attention-heads 0", r"--num-attention-heads 0; valid: at least 1"),
        ("--num-attention-heads 3", r"--num-attention-heads is 3; .*--hidden-size, which is 64"),
        ("--num-query-groups 3", r"--num-query-groups is 3; .*--num-attention-heads, which is 4"),
        ("--num-query-groups 0", r"--num-query-groups is 0; valid: at least 1"),
        ("--group-query-attention", r"--group-query-attention needs --num-query-groups"),
        ("--max-position-embeddings 16", r"--max-position-embeddings is 16; .*which is 32"),
        ("--tensor-model-parallel-size 3", r"--tensor-model-parallel-size is 3; .*which is 8"),
        ("--tensor-model-parallel-size 0", r"--tensor-model-parallel-size is 0"),
        ("--tensor-model-parallel-size 8", r"--num-attention-heads is 4; .*which is 8"),
        (
            "--tensor-model-parallel-size 4 --ffn-hidden-size 90",
            r"--ffn-hidden-size is 90; .*which is 4",
        ),
        (
            "--num-attention-heads 12 --kv-channels 16 --num-query-groups 3 "
            "--tensor-model-parallel-size 2",
            r"--num-query-groups is 3; .*which is 2",
        ),
        ("--sequence-parallel", r"--sequence-parallel needs --tensor-model-parallel-size"),
        (
            "--sequence-parallel --tensor-model-parallel-size 2 --seq-length 33",
            r"--seq-length is 33; .*which is 2",
        ),
        ("--kv-channels 3", r"--kv-channels 3 .*rotates 3 channels"),
        ("--global-batch-size 24", r"--global-batch-size 24 is not a multiple .* 2 x 8"),
        *(
            (flags, r"--recompute-method .* and --recompute-num-layers, 1 to .*which is 2")
            for flags in (
                "--recompute-granularity full",
                "--recompute-granularity full --recompute-num-layers 1",
                "--recompute-granularity full --recompute-method block",
            )
        ),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 3",
            r"--recompute-num-layers is 3; .*which is 2",
        ),
        ("--recompute-method block", r"--recompute-method is block; .*granularity full"),
        ("--recompute-modules mlp", r"--recompute-modules needs"),
        ("--lr-warmup-iters 10", r"--lr-warmup-iters is 10; .*which is 10"),
        ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", r"either --lr-warmup-iters or"),
        ("--lr-warmup-fraction 1.5", r"--lr-warmup-fraction is 1.5"),
        ("--min-lr 0.1", r"--min-lr is 0.1; valid: at most --lr, which is 0.001"),
        ("--lr 0", r"--lr is 0.0; valid: above 0"),
        ("--lr nan", r"--lr is nan"),
        ("--lr-decay-style WSD", r"--lr-wsd-decay-iters is None; .*1 to 10"),
        ("--lr-wsd-decay-iters 3", r"--lr-wsd-decay-iters is 3; it needs --lr-decay-style WSD"),
        ("--adam-beta1 1", r"--adam-beta1 is 1.0"),
        ("--clip-grad -1", r"--clip-grad is -1.0"),
        (
            "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
            r"exclude each other",
        ),
        ("--attention-dropout 0.1", r"--attention-dropout is 0.1; valid: 0"),
        ("--train-data-path x", r"one of --data-path, --data-args-path and --train-data-"),
        ("--split a,b", r"--split is 'a,b'"),
        ("--split 0,1,1", r"--split is '0,1,1'"),
        ("--split 9,1 --valid-data-path x", r'already makes the validation set "valid"'),
        ("--valid-data x", r"--valid-data 'x'; valid: NAME=PREFIX"),
        ("--valid-data a=x a=y", r"the name 'a' is taken"),
        ("--tokenizer-type HuggingFaceTokenizer", r"needs --tokenizer-model"),
        ("--save-interval 5", r"--save-interval needs --save"),
        ("--finetune", r"--finetune needs --load"),
        ("--override-sat-schedule", r"--override-sat-schedule needs --load"),
        ("--wandb-exp-name x", r"--wandb-exp-name needs --wandb-project"),
        ("--sat-omission-rate 1.0", r"--sat-omission-rate.*1.0.*\[0, 1\)"),
        ("--sat-omission-rate 0.5 --sat-metric loss", r"--sat-metric.*'loss'.*maxip"),
        (
            "--sat-omission-rate 0.5 --sat-decay-start-step 11",
            r"--sat-decay-start-step.*11.*which is 10",
        ),
    ],
)
def test_bad_flags_are_named_with_what_is_valid(flags, named):
    given = {part.removeprefix("--") for part in flags.split() if part.startswith("--")}
    with pytest.raises(ValueError, match=named):
        parse(flags, world_size=8, without=" ".join(given & DEFAULTS.keys()))


def test_null_tokenizer_needs_a_vocabulary():
    with pytest.raises(ValueError, match="--vocab-size"):
        parse(without="vocab-size")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--sat-selection-groups 1", r"--sat-selection-groups is 1; .*which is 2"),
        ("--sat-selection-groups 3", r"--sat-selection-groups is 3"),
        ("--sat-selection-groups 8", r"--sat-selection-groups is 8; .*the 4 query groups"),
        (GQA + "--sat-selection-groups 4", r"--sat-selection-groups is 4; .*the 2 query groups"),
        (
            "--sat-selection-groups 4 --ffn-hidden-size 90",
            r"--sat-selection-groups is 4; .*--ffn-hidden-size, which is 90",
        ),
    ],
)
def test_selection_groups_of_a_new_run(flags, named):
    config = parse(f"--sat-omission-rate 0.5 --tensor-model-parallel-size 2 {flags}", world_size=2)
    with pytest.raises(ValueError, match=named):
        check_sat_layout(config, resuming=False)


def test_selection_groups_of_a_resumed_run():
    flags = "--sat-omission-rate 0.5 --tensor-model-parallel-size 2 --sat-selection-groups 1"
    check_sat_layout(parse(flags, world_size=2), resuming=True)


def test_fewer_query_groups_than_tensor_parallel_ranks():
    flags = "--sat-omission-rate 0.5 --tensor-model-parallel-size 4 --num-query-groups 2"
    with pytest.raises(ValueError, match="query groups"):
        check_sat_layout(parse(flags, world_size=4), resuming=False)
    check_sat_layout(parse(flags + " --sat-modules mlp", world_size=4), resuming=False)


def test_trying_directories_leaves_nothing_behind(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for save in (tmp_path / "runs" / "one", kept / "two", kept):
        check_paths(parse(f"--save {save} --save-hf {save}-hf"), rank=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_directories_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"--load .*nowhere: there is no such directory"):
        check_paths(parse(f"--load {tmp_path / 'nowhere'}"), rank=1)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"--save .*file/run cannot be written"):
        check_paths(parse(f"--save {file / 'run'}"), rank=0)
    with pytest.raises(ValueError, match=r"--save-hf .*/file cannot be written"):
        check_paths(parse(f"--save-hf {file / 'hf'}"), rank=0)
    every = f"--save {tmp_path} --save-hf {file / 'hf'} --save-hf-every-save"
    with pytest.raises(ValueError, match=r"--save-hf .*/file/hf cannot be written"):
        check_paths(parse(every), rank=0)
