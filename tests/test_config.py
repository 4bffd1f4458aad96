"""SATConfig: what it refuses, how it travels through JSON, and its flags."""

import argparse
import dataclasses
import json
import math

import pytest

from megatron_sat.config import SATConfig, add_sat_arguments, sat_config_from_args

REQUIRED = {"omission_rate": 0.5, "total_steps": 3000, "decay_start_step": 2000}


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("omission_rate", 1.0, "a number in [0, 1)"),
        ("omission_rate", -0.1, "a number in [0, 1)"),
        ("omission_rate", math.nan, "a number in [0, 1)"),
        ("omission_rate", "0.5", "a number in [0, 1)"),
        ("omission_rate", True, "a number in [0, 1)"),
        ("total_steps", 0, "an integer of at least 1"),
        ("total_steps", 3000.0, "an integer of at least 1"),
        ("total_steps", True, "an integer of at least 1"),
        ("decay_start_step", -1, "an integer of at least 0"),
        ("decay_start_step", 3001, "0 to total_steps (--sat-total-steps), which is 3000"),
        ("schedule", "step", "one of ladder, constant, linear, cosine"),
        ("ladder_rungs", 0, "an integer of at least 1"),
        ("metric", "maxp", "one of uniform, magnitude, wanda, maxip"),
        ("selection", "topk", "one of sampling, top-k, static"),
        ("temperature", 0.0, "a number above 0"),
        ("temperature", math.inf, "a number above 0"),
        ("temperature", math.nan, "a number above 0"),
        ("modules", (), "one or more of attention, mlp, each once"),
        ("modules", "mlp", "one or more of attention, mlp, each once"),
        ("modules", ("mlp", "mlp"), "one or more of attention, mlp, each once"),
        ("modules", ("mlp", "head"), "one or more of attention, mlp, each once"),
        ("modules", (["mlp"],), "one or more of attention, mlp, each once"),
        ("selection_groups", 0, "an integer of at least 1"),
        ("channel_multiple", 0, "an integer of at least 1"),
        ("scope", "iteration", "one of step, micro-batch"),
        ("seed", -1, "an integer of at least 0"),
        ("seed", None, "an integer of at least 0"),
    ],
)
def test_refusal_names_field_flag_value_and_what_is_valid(name, value, valid):
    with pytest.raises(ValueError) as error:
        SATConfig(**REQUIRED | {name: value})
    flag = "--sat-" + name.replace("_", "-")
    assert str(error.value) == f"{name} ({flag}) is {value!r}; valid: {valid}"


@pytest.mark.parametrize(
    "values",
    [
        {"omission_rate": 0},
        {"omission_rate": 0.96, "ladder_rungs": 1},
        {"decay_start_step": 0},
        {"decay_start_step": 3000},
        {"selection_groups": 8},
        {"temperature": 1},
        {"seed": 0},
    ],
)
def test_borders_of_what_is_valid(values):
    config = SATConfig(**REQUIRED | values)
    assert {name: getattr(config, name) for name in values} == values
    assert isinstance(config.omission_rate, float) and isinstance(config.temperature, float)


def test_fields_are_keyword_only_and_fixed():
    with pytest.raises(TypeError):
        SATConfig(0.5, 3000, 2000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SATConfig(**REQUIRED).seed = 1


def test_order_of_modules_does_not_make_another_config():
    assert SATConfig(**REQUIRED, modules=["mlp", "attention"]) == SATConfig(**REQUIRED)


def test_json_round_trip():
    config = SATConfig(
        omission_rate=0.3,
        total_steps=10,
        decay_start_step=7,
        schedule="cosine",
        ladder_rungs=2,
        metric="wanda",
        selection="static",
        temperature=0.1,
        modules=("mlp",),
        selection_groups=4,
        channel_multiple=64,
        scope="micro-batch",
        seed=7,
    )
    as_json = json.loads(json.dumps(config.to_dict()))
    assert as_json == config.to_dict()
    assert SATConfig.from_dict(as_json) == config
    assert hash(SATConfig.from_dict(as_json)) == hash(config)


def test_from_dict_refuses_unknown_missing_and_invalid_values():
    with pytest.raises(ValueError, match="unknown SAT settings rungs; valid: omission_rate, "):
        SATConfig.from_dict(REQUIRED | {"rungs": 5})
    with pytest.raises(ValueError, match="SAT settings lack total_steps, decay_start_step"):
        SATConfig.from_dict({"omission_rate": 0.5})
    with pytest.raises(ValueError, match=r"metric .* is 'x'"):
        SATConfig.from_dict(REQUIRED | {"metric": "x"})


def parse(*flags: str, train_iters: int | None = 3000) -> SATConfig | None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train-iters", type=int, default=train_iters)
    add_sat_arguments(parser)
    return sat_config_from_args(parser.parse_args(flags))


def test_training_is_dense_without_a_rate():
    assert parse() is None
    assert parse("--sat-omission-rate", "0.0", "--sat-total-steps", "9") is None


def test_flags_default_to_the_config_and_the_schedule_to_the_papers_proportion():
    assert parse("--sat-omission-rate", "0.5") == SATConfig(**REQUIRED)
    config = parse("--sat-omission-rate", "0.5", "--sat-total-steps", "450")
    assert (config.total_steps, config.decay_start_step) == (450, 300)


def test_every_field_has_its_flag():
    given = {
        "omission_rate": "0.25",
        "total_steps": "100",
        "decay_start_step": "0",
        "schedule": "linear",
        "ladder_rungs": "3",
        "metric": "magnitude",
        "selection": "top-k",
        "temperature": "0.2",
        "modules": "mlp",
        "selection_groups": "2",
        "channel_multiple": "1",
        "scope": "micro-batch",
        "seed": "5",
    }
    assert set(given) == {field.name for field in dataclasses.fields(SATConfig)}
    flags = [part for n, v in given.items() for part in ("--sat-" + n.replace("_", "-"), v)]
    parsed = parse(*flags).to_dict()
    assert {n: str(v) for n, v in parsed.items()} == given | {"modules": "['mlp']"}


def test_a_flag_that_would_have_no_effect_is_refused():
    for flags in (["--sat-metric", "maxip"], ["--sat-seed", "0"], ["--sat-modules", "mlp"]):
        with pytest.raises(ValueError, match=f"--sat-omission-rate is needed with {flags[0]}"):
            parse(*flags)
        assert parse(*flags, "--sat-omission-rate", "0") is None
    with pytest.raises(ValueError, match="--sat-total-steps, --sat-scope: without it"):
        parse("--sat-scope", "step", "--sat-total-steps", "9")


def test_both_modules_from_the_command_line():
    config = parse("--sat-omission-rate", "0.5", "--sat-modules", "mlp", "attention")
    assert config.modules == ("attention", "mlp")


def test_bad_flags_are_refused_by_name(capsys):
    with pytest.raises(ValueError, match=r"--sat-omission-rate\) is 1.0"):
        parse("--sat-omission-rate", "1.0")
    with pytest.raises(ValueError, match=r"--sat-omission-rate\) is -0.5"):
        parse("--sat-omission-rate", "-0.5")
    with pytest.raises(ValueError, match=r"--sat-decay-start-step\) is 9; .*--sat-total-steps"):
        parse("--sat-omission-rate", "0.5", "--sat-decay-start-step", "9", train_iters=8)
    with pytest.raises(ValueError, match="--sat-total-steps or --train-iters"):
        parse("--sat-omission-rate", "0.5", train_iters=None)
    with pytest.raises(ValueError, match=r"total_steps \(--sat-total-steps\) is -3"):
        parse("--sat-omission-rate", "0.5", "--sat-total-steps", "-3")
    with pytest.raises(SystemExit):
        parse("--sat-metric", "maxp")
    assert "argument --sat-metric: invalid choice: 'maxp'" in capsys.readouterr().err
