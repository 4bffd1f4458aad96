import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_sat.training.arguments import parse_args
from megatron_sat.training.deepspeed_config import build_deepspeed_config
from megatron_sat.training.offloading import check_parameter_buffers, offloads_optimizer

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 10 "
    "--lr 0.001 --data-path data --tokenizer-type NullTokenizer --vocab-size 100"
)
REQUIRED = FLAGS.split()


def parse(tmp_path: Path, user: object, *flags: str, world_size: int = 2):
    path = tmp_path / "ds.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    return parse_args([*REQUIRED, "--deepspeed_config", str(path), *flags], world_size=world_size)


def build(tmp_path: Path, user: object, *flags: str, world_size: int = 2):
    config = parse(tmp_path, user, *flags, world_size=world_size)
    return build_deepspeed_config(config, world_size=world_size)


def test_flags_alone(tmp_path):
    flags = "--micro-batch-size 2 --global-batch-size 16 --bf16 --clip-grad 0.5 --zero-stage 2"
    result = build(tmp_path, {}, *flags.split())
    assert result["train_micro_batch_size_per_gpu"] == 2
    assert result["train_batch_size"] == 16
    assert result["gradient_accumulation_steps"] == 4
    assert result["gradient_clipping"] == 0.5
    assert result["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert result["data_types"] == {"grad_accum_dtype": "fp32"}
    assert result["zero_optimization"]["stage"] == 2
    assert "stage3_prefetch_bucket_size" not in result["zero_optimization"]


def test_stage_3_and_float32_by_default(tmp_path):
    result = build(tmp_path, {}, "--micro-batch-size", "1")
    assert result["zero_optimization"]["stage"] == 3
    assert result["bf16"] == {"enabled": False}
    assert "data_types" not in result
    assert result["train_batch_size"] == 2


ON_CPU = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("user", "global_batch", "dtype"),
    [
        ({}, 2, "bf16"),
        ({}, 4, "fp32"),
        (ON_CPU, 2, "fp32"),
        ({"communication_data_type": "fp32"}, 2, "fp32"),
    ],
)
def test_gradients_are_kept_in_float32_where_that_makes_a_difference(
    tmp_path, user, global_batch, dtype
):
    flags = f"--bf16 --micro-batch-size 1 --global-batch-size {global_batch}"
    assert build(tmp_path, user, *flags.split())["data_types"] == {"grad_accum_dtype": dtype}


def test_json_fills_what_flags_leave_open(tmp_path):
    user = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 12345,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "communication_data_type": "fp32",
    }
    config = parse(tmp_path, user)
    assert (config.micro_batch_size, config.global_batch_size) == (4, 24)
    assert (config.parallel.zero_stage, config.bf16) == (1, True)
    assert config.optimizer.clip_grad == 0.25
    result = build_deepspeed_config(config, world_size=2)
    assert result["zero_optimization"]["reduce_bucket_size"] == 12345
    assert result["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert result["communication_data_type"] == "fp32"
    assert offloads_optimizer(result)
    assert config.deepspeed_config == user, "the user's own JSON is what a checkpoint carries"


def test_micro_batch_follows_from_the_other_two(tmp_path):
    user = {"train_batch_size": 24, "gradient_accumulation_steps": 3}
    assert parse(tmp_path, user).micro_batch_size == 4


def test_auto_is_filled(tmp_path):
    user = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    result = build(tmp_path, user, "--micro-batch-size", "2", "--zero-stage", "3")
    assert "auto" not in json.dumps(result)
    assert result["zero_optimization"]["stage3_param_persistence_threshold"] == 640


def test_unknown_auto_is_refused(tmp_path):
    user = {"zero_optimization": {"sub_group_size": "auto"}}
    with pytest.raises(ValueError, match=r'"zero_optimization.sub_group_size".*"auto"'):
        build(tmp_path, user, "--micro-batch-size", "1")


@pytest.mark.parametrize(
    ("user", "flags", "named"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "--zero-stage 3 --micro-batch-size 1",
            r'--zero-stage is 3 but "zero_optimization.stage".*is 2',
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "--micro-batch-size 1",
            r'--micro-batch-size is 1 but "train_micro_batch_size_per_gpu".*is 2',
        ),
        (
            {"train_batch_size": 8},
            "--micro-batch-size 1 --global-batch-size 4",
            r'--global-batch-size is 4 but "train_batch_size".*is 8',
        ),
        (
            {"gradient_accumulation_steps": 3},
            "--micro-batch-size 1 --global-batch-size 4",
            r'--global-batch-size 4.*makes 2 .*"gradient_accumulation_steps".*is 3',
        ),
        (
            {"gradient_clipping": 1.0},
            "--micro-batch-size 1 --clip-grad 0.5",
            r'--clip-grad is 0.5 but "gradient_clipping".*is 1.0',
        ),
        (
            {"bf16": {"enabled": False}},
            "--micro-batch-size 1 --bf16",
            r'--bf16 is True but "bf16.enabled".*is False',
        ),
        ({"fp16": {"enabled": True}}, "--micro-batch-size 1", r"fp16 is not supported.*--bf16"),
        (
            {"optimizer": {"type": "AdamW"}},
            "--micro-batch-size 1",
            r'section "optimizer" is not used.*--lr',
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "--micro-batch-size 1",
            r'section "scheduler" is not used.*--lr-warmup-iters',
        ),
        ("{", "--micro-batch-size 1", r"is not valid JSON"),
        ("[]", "--micro-batch-size 1", r"must hold a JSON object"),
        ({}, "", r"--micro-batch-size is required"),
        (
            {},
            "--micro-batch-size 3 --global-batch-size 8",
            r"--global-batch-size 8 is not a multiple of --micro-batch-size 3 x 2",
        ),
    ],
)
def test_contradictions_and_bad_files_name_both_sides(tmp_path, user, flags, named):
    with pytest.raises(ValueError, match=named):
        parse(tmp_path, user, *flags.split())


def test_missing_file():
    with pytest.raises(ValueError, match=r"--deepspeed_config nowhere.json: No such file"):
        parse_args([*REQUIRED, "--deepspeed_config", "nowhere.json"])


def test_unknown_zero_field_is_refused_before_training(tmp_path):
    user = {"zero_optimization": {"offload_optimizer": {"device": "disk"}}}
    with pytest.raises(
        ValueError,
        match=r'"zero_optimization.offload_optimizer.device" in .* is \'disk\': .*\'cpu\'',
    ):
        build(tmp_path, user, "--micro-batch-size", "1")


def test_compiled_graphs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'"compile.deepcompile" in .* is true; valid: false, or'):
        build(tmp_path, {"compile": {"deepcompile": True}}, "--micro-batch-size", "1")
    build(tmp_path, {"compile": {"deepcompile": False}}, "--micro-batch-size", "1")


NVME = {"device": "nvme", "nvme_path": "/tmp"}
STAGE_2 = ("--zero-stage", "2")


@pytest.mark.parametrize(
    ("zero", "flags", "named"),
    [
        (
            {"stage3_module_granularity_threshold": 60000},
            (),
            'stage3_module_granularity_threshold" in --deepspeed_config is 60000; valid: 0, or '
            "to leave it out: DeepSpeed would free weights that are still in use",
        ),
        (
            {"zenflow": {"topk_ratio": 0.1}, "offload_optimizer": {"device": "cpu"}},
            (),
            r'"zero_optimization.zenflow" in --deepspeed_config is {"topk_ratio": 0.1}; valid: to '
            "leave it out, since it counts micro-batches in a way of its own",
        ),
        (
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            (),
            r'"zero_optimization.offload_optimizer.super_offload" in --deepspeed_config is true; '
            "valid: to leave it out, since it keeps optimizer states in another process",
        ),
        (
            {"offload_optimizer": NVME},
            STAGE_2,
            'offload_optimizer" .* is for "nvme", but --zero-stage is 2; valid: at least 3',
        ),
        (
            {"offload_param": NVME},
            STAGE_2,
            'offload_param" .* is for "nvme", but --zero-stage is 2; valid: at least 3',
        ),
        (
            {"offload_param": {"device": "nvme"}},
            (),
            'offload_param" .* is for "nvme" and has no "nvme_path"; valid: a folder',
        ),
        (
            {"offload_optimizer": NVME | {"ratio": 0.5}},
            (),
            'offload_optimizer.ratio" .* is 0.5; valid with the device "nvme": 1.0',
        ),
        (
            {"offload_param": NVME, "stage3_prefetch_bucket_size": 1000},
            (),
            'stage3_prefetch_bucket_size" .* is 1000; valid with parameters on "nvme": 0, or to l',
        ),
        (
            {"offload_param": NVME, "stage3_max_reuse_distance": 1e9},
            (),
            'stage3_max_reuse_distance" .* is 1000000000.0; valid with parameters on "nvme": 0, o',
        ),
        (
            {"offload_optimizer": NVME | {"pipeline_write": True, "buffer_count": 7}},
            (),
            'offload_optimizer.buffer_count" .* is 7; valid with its "pipeline_.*: at least 8, or',
        ),
        ({"offload_optimizer": NVME}, (), "nvme.* needs libaio and its headers; install libaio"),
    ],
)
def test_offloading_that_is_not_supported_is_refused_before_any_run(tmp_path, zero, flags, named):
    with (
        mock.patch("deepspeed.ops.op_builder.AsyncIOBuilder") as builder,
        pytest.raises(ValueError, match=named),
    ):
        builder().is_compatible.return_value = False
        build(tmp_path, {"zero_optimization": zero}, "--micro-batch-size", "1", *flags)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4),
        ({"pipeline_read": True}, 8),
        ({"pipeline_read": True, "pipeline_write": True, "buffer_count": "auto"}, 12),
        ({"pipeline_read": True, "pipeline_write": True, "buffer_count": 13}, 13),
    ],
)
def test_buffers_for_states_are_as_many_as_a_pipeline_takes(tmp_path, settings, count):
    user = {"zero_optimization": {"offload_optimizer": NVME | settings}}
    with mock.patch("deepspeed.ops.op_builder.AsyncIOBuilder"):
        built = build(tmp_path, user, "--micro-batch-size", "1")
    assert built["zero_optimization"]["offload_optimizer"]["buffer_count"] == count


# The matrices of a layer have (3 x 4096, 4096, 2 x 11008 and 11008) x 4096 entries, the embedding
# 32000 x 4096.
TIED = (
    "--hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008 --swiglu --bf16 "
    "--micro-batch-size 1 "
)
LLAMA_7B = f"{TIED}--untie-embeddings-and-output-weights "


def check_buffers(tmp_path, buffers, flags, *, world_size, **zero):
    user = {"zero_optimization": {"offload_param": NVME | buffers, **zero}}
    config = parse(tmp_path, user, *flags.split(), world_size=world_size)
    with mock.patch("deepspeed.ops.op_builder.AsyncIOBuilder"):
        built = build_deepspeed_config(config, world_size=world_size)
    for field in ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance"):
        assert built["zero_optimization"][field] == 0
    ranks = config.data_parallel_size(world_size)
    check_parameter_buffers(built, config, data_parallel=ranks, padded_vocab=32000)


@pytest.mark.parametrize(
    ("flags", "world_size", "size", "count"),
    [
        (LLAMA_7B, 1, 131_072_000, 4),
        (TIED, 1, 131_072_000, 5),
        (LLAMA_7B, 8, 16_384_000, 4),
        # Less than a megabyte, as the output projection's part, stays in memory.
        (LLAMA_7B, 80, 1_638_400, 3),
        (TIED, 100, 1_310_720, 2),
        (f"{TIED}--ffn-hidden-size 22016", 1, 180_355_072, 5),
        (f"{LLAMA_7B}--tensor-model-parallel-size 4", 8, 16_384_000, 4),
        (LLAMA_7B, 1000, 0, 0),
    ],
)
def test_buffers_for_parameters_hold_what_is_needed_at_once(
    tmp_path, flags, world_size, size, count
):
    enough = {"buffer_size": size, "buffer_count": count}
    check_buffers(tmp_path, enough, flags, world_size=world_size, stage3_max_reuse_distance="auto")
    for name, needed in enough.items() if count else ():
        with pytest.raises(
            ValueError, match=rf'offload_param\.{name}" .* is {needed - 1}; .* at least {needed}, '
        ):
            check_buffers(tmp_path, enough | {name: needed - 1}, flags, world_size=world_size)


def test_buffers_that_are_not_given_are_deepspeeds(tmp_path):
    check_buffers(tmp_path, {}, TIED, world_size=2)
    message = "buffer_size\" .* is 100000000, DeepSpeed's default; .*: at least 131072000, "
    with pytest.raises(ValueError, match=message):
        check_buffers(tmp_path, {}, TIED, world_size=1)


def test_offloading_that_is_off_is_not_refused(tmp_path):
    off = {"zenflow": None, "offload_optimizer": {"device": "none", "super_offload": False}}
    build(tmp_path, {"zero_optimization": off}, "--micro-batch-size", "1")


def test_a_secret_is_refused_where_deepspeed_would_print_it(tmp_path):
    message = r'"comet\.api_key" is a secret, .* as COMET_API_KEY'
    with pytest.raises(ValueError, match=message) as error:
        parse(tmp_path, {"comet": {"enabled": True, "api_key": "s3cret"}})
    assert "s3cret" not in str(error.value)
    unset = {"train_micro_batch_size_per_gpu": 1, "comet": {"api_key": None}}
    assert parse(tmp_path, unset).deepspeed_config == unset


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (
            {"stage3_prefetch_bucket_sise": 1000},
            r'no field "zero_optimization.stage3_prefetch_bucket_sise"; '
            r'is it "stage3_prefetch_bucket_size"\?',
        ),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memoy": True}},
            r'no field "zero_optimization.offload_optimizer.pin_memoy"; is it "pin_memory"\?',
        ),
        (
            {"overlap_comm": "yes"},
            r'"zero_optimization.overlap_comm" in .* is \'yes\'; valid: true or false',
        ),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memory": 1}},
            r'"zero_optimization.offload_optimizer.pin_memory" in .* is 1; valid: true or false',
        ),
        (
            {"stage3_gather_16bit_weights_on_model_save": "no"},
            r'stage3_gather_16bit_weights_on_model_save" in .* is \'no\'; valid: true or false',
        ),
    ],
)
def test_fields_of_sections_are_refused_as_those_of_the_top(tmp_path, zero, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, {"zero_optimization": zero}, "--micro-batch-size", "1")
