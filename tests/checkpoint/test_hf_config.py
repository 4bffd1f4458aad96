import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_sat.checkpoint.hf_config import config_json, read_hf_config
from megatron_sat.testing.huggingface import FAMILY_CASES, write_model
from megatron_sat.training.arguments import parse_args

FLAGS = (
    "--seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 0.1 --train-data-path data "
    "--load-hf "
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama3.1")


def edited(folder: Path, place: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value != "absent"}
    (place / "config.json").write_text(json.dumps(values))
    return place


def test_the_command_line_takes_shape_and_tokenizer_from_the_folder(llama: Path) -> None:
    config = parse_args((FLAGS + str(llama)).split(), world_size=1)
    model = config.model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (2, 48, 80)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (6, 2, 16)
    assert (model.vocab_size, model.max_position_embeddings, model.seq_length) == (131, 128, 32)
    assert (model.use_rope_scaling, model.rope_scaling_factor) == (True, 8.0)
    assert model.untie_embeddings_and_output_weights
    assert config.data.tokenizer_type == "HuggingFaceTokenizer"
    assert config.data.tokenizer_model == str(llama)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--num-layers 3", ["--num-layers is 3", "gives 2 (num_hidden_layers)"]),
        ("--rotary-base 5", ["--rotary-base is 5", "rope_theta"]),
        ("--qk-layernorm", ["--qk-layernorm is True", "gives False (model_type llama)"]),
        ("--no-swiglu", ["--swiglu is False"]),
        ("--add-bias-linear", ["--add-bias-linear is True"]),
        ("--window-size 7,0", ["--window-size is (7, 0)", "gives None (sliding_window)"]),
        ("--vocab-size 100", ["--vocab-size is 100", "gives 131"]),
    ],
)
def test_a_flag_that_contradicts_the_folder_is_refused(
    llama: Path, flag: str, named: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        parse_args((FLAGS + f"{llama} {flag}").split(), world_size=1)
    for part in [*named, str(llama / "config.json")]:
        assert part in str(error.value)


def test_a_flag_that_agrees_is_welcome(llama: Path) -> None:
    flags = f"{llama} --num-layers 2 --swiglu --use-rope-scaling --disable-bias-linear"
    assert parse_args((FLAGS + flags).split(), world_size=1).model.num_layers == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--window-size 7", "--window-size is"),
        ("--window-size 7,1", "--window-size is"),
        ("--window-size 7,0 --window-attn-skip-freq 1", "--window-attn-skip-freq is"),
        ("--window-size 7,0 --window-attn-skip-freq 1,2", "--window-attn-skip-freq is"),
        ("--use-rope-scaling --rope-scaling-factor 0.5", "--rope-scaling-factor is 0.5"),
        ("--save-hf-every-save --save here", "--save-hf-every-save needs --save-hf"),
        ("--save-hf there --save-hf-every-save", "--save-hf-every-save needs --save"),
        ("--save-hf-dtype float32", "--save-hf-dtype needs --save-hf"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: str, message: str) -> None:
    line = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --train-iters 1 "
        "--micro-batch-size 1 --lr 0.1 --train-data-path data --tokenizer-type NullTokenizer "
        "--vocab-size 9 "
    )
    assert parse_args(line.split(), world_size=1)
    with pytest.raises(ValueError, match=message):
        parse_args((line + flags).split(), world_size=1)


def test_without_a_folder_the_shape_is_required() -> None:
    flags = "--seq-length 32 --micro-batch-size 1 --train-iters 1 --lr 0.1 --train-data-path data"
    with pytest.raises(ValueError, match=r"required: --num-layers, --hidden-size.*--load-hf"):
        parse_args([*flags.split(), "--tokenizer-type", "NullTokenizer"], world_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM.*known"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "absent"}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "low_freq_factor.*is 2.0; supported: 1.0",
        ),
    ],
)
def test_what_our_model_does_not_compute_is_refused(
    llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_hf_config(edited(llama, tmp_path, **changes))
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_missing_or_damaged_config_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "config.json")):
        read_hf_config(tmp_path)


def test_transformers_4_names_of_rope_settings_are_read(llama: Path, tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = edited(llama, tmp_path, rope_parameters="absent", rope_theta=5e5, rope_scaling=scaling)
    fields = read_hf_config(folder).fields
    assert fields["rotary_base"] == 5e5
    assert (fields["use_rope_scaling"], fields["rope_scaling_factor"]) == (True, 32.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_frequencies_are_those_of_transformers(factor: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    ours = RotaryEmbedding(
        128,
        1.0,
        rotary_base=500000.0,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    plain = RotaryEmbedding(128, 1.0, rotary_base=500000.0, use_cpu_initialization=True)
    assert torch.allclose(ours.inv_freq, expected, rtol=1e-6, atol=0)
    changed = ours.inv_freq != plain.inv_freq
    assert 20 < changed.sum() < 44


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_new_config_says_what_the_old_one_said(case: str, tmp_path: Path) -> None:
    old = read_hf_config(write_model(tmp_path / "old", case))
    new = tmp_path / "new"
    new.mkdir()
    model = old.model()
    values = config_json(model, dtype="float32", source=None, tokens={"eos_token_id": 2})
    (new / "config.json").write_text(json.dumps(values))
    if case == "qwen2.5-window":
        assert values["layer_types"] == ["full_attention", "sliding_attention"]
    read = read_hf_config(new)
    assert read.fields == old.fields
    # A Mistral without a window is a Llama.
    assert read.family is old.family or case == "mistral-no-window"
