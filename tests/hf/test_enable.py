"""Putting SAT on a model, what it leaves alone, and what it refuses."""

import copy
import io
import logging
import subprocess
import sys
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn

from megatron_sat import SATConfig
from megatron_sat.hf import disable_sat, enable_sat
from megatron_sat.testing.huggingface import build_model

IDS = torch.arange(24).view(2, 12)


def sat(**changes: Any) -> SATConfig:
    settings = {
        "omission_rate": 0.5,
        "total_steps": 10,
        "decay_start_step": 10,
        "channel_multiple": 8,
    }
    return SATConfig(**(settings | changes))


def forward(model: Any, **inputs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **({"use_cache": False} | inputs)).logits


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def everything_on(module: nn.Module) -> list[Any]:
    """The attributes of all modules, hooks included, but for what torch keeps in common."""
    return [
        {name: str(value) for name, value in inner.__dict__.items() if name != "_modules"}
        for inner in module.modules()
    ]


def test_parameters_files_and_evaluation_stay_as_they_are(tmp_path: Any) -> None:
    stock = build_model("qwen3").eval()
    model = copy.deepcopy(stock)
    state = enable_sat(model, sat())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in stock.named_parameters()
    ]
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(forward(model.eval()), forward(stock))
    state.begin_step(1)
    sparse = forward(model.train())
    assert not torch.equal(sparse, forward(stock))
    assert torch.equal(forward(model.eval()), forward(stock))
    generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, stock.generate(IDS, max_new_tokens=4, do_sample=False))
    model.save_pretrained(tmp_path / "sat")
    stock.save_pretrained(tmp_path / "stock")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "sat" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_disable_leaves_nothing_behind() -> None:
    model = build_model("qwen2").train()
    stock = copy.deepcopy(model)
    before = everything_on(model)
    state = enable_sat(model, sat())
    assert classes(model) != classes(stock)
    state.begin_step(1)
    forward(model)
    disable_sat(model)
    assert classes(model) == classes(stock)
    assert everything_on(model) == before
    assert torch.equal(forward(model), forward(stock))
    disable_sat(model)  # once is enough, twice does no harm
    enable_sat(model, sat()).begin_step(1)
    assert not torch.equal(forward(model), forward(stock))


def test_a_copied_and_a_pickled_model_stand_alone() -> None:
    model = build_model("llama3").train()
    state = enable_sat(model, sat())
    state.begin_step(1)
    expected = forward(model)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(forward(other), expected)
        disable_sat(other)
        assert all(not kind.__name__.startswith("SAT") for _, kind in classes(other))
    assert torch.equal(forward(model), expected)


def test_rate_0_and_what_rounding_keeps_run_the_models_own_forward() -> None:
    model = build_model("llama2").train()
    stock = copy.deepcopy(model)
    state = enable_sat(model, sat(total_steps=4, decay_start_step=2, ladder_rungs=1))
    for step, dense in ((2, False), (3, True), (5, True)):
        state.begin_step(step)
        assert torch.equal(forward(model), forward(stock)) == dense


def test_micro_batches_are_counted_and_share_a_subset_unless_told_otherwise() -> None:
    for scope, different in (("step", 1), ("micro-batch", 3)):
        model = build_model("llama3").train()
        state = enable_sat(model, sat(scope=scope))
        state.begin_step(4)
        checksums, indices = [], []
        for _ in range(3):
            forward(model)
            checksums.append(state.checksum())
            indices.append(state.micro_batch)
            with torch.no_grad():
                forward(model.eval())
            model.train()
        assert indices == [0, 1, 2]
        assert len(set(checksums)) == different


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scope", ["step", "micro-batch"])
def test_recomputation_uses_the_subset_of_the_first_pass(scope: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_model("qwen2.5-window").train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        state = enable_sat(model, sat(scope=scope))
        state.begin_step(1)
        for _ in range(2):
            forward(model).square().mean().backward()
        assert state.micro_batch == 1
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scope", ["step", "micro-batch"])
def test_a_forward_without_gradients_leaves_the_subset(scope: str, reentrant: bool) -> None:
    """A teacher's or a reference's, in training mode, before each backward pass."""
    gradients = []
    for among in (False, True):
        model = build_model("llama3").train()
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        state = enable_sat(model, sat(scope=scope))
        state.begin_step(1)
        for _ in range(2):
            loss = forward(model).square().mean()
            if among:
                with torch.no_grad():
                    forward(model, attention_mask=torch.ones_like(IDS).tril())
            loss.backward()
        assert state.micro_batch == 1
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
    # As the first of a step it decides.
    state.begin_step(2)
    with torch.no_grad():
        forward(model)
    checksum = state.checksum()
    forward(model).mean().backward()
    assert (state.checksum() == checksum) == (scope == "step")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_an_earlier_micro_batch_is_refused(reentrant: bool) -> None:
    model = build_model("llama3").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    state = enable_sat(model, sat(scope="micro-batch"))
    state.begin_step(1)
    forward(model).mean().backward()
    loss = forward(model).mean() + forward(model).mean()
    with pytest.raises(RuntimeError, match=r'2 forwards before one backward.*scope="step"'):
        loss.backward()


def test_a_batch_of_padding_alone() -> None:
    model = build_model("llama3").train()
    state = enable_sat(model, sat())
    state.begin_step(1)
    forward(model, attention_mask=torch.zeros_like(IDS))
    assert state.checksum() is not None


def test_a_forward_before_the_first_step_is_an_error() -> None:
    model = build_model("llama3").train()
    enable_sat(model, sat())
    with pytest.raises(RuntimeError, match=r"SATCallback\(config\).*begin_step"):
        forward(model)
    forward(model.eval())


def test_generating_in_training_mode_is_an_error() -> None:
    model = build_model("llama2").train()
    state = enable_sat(model, sat(decay_start_step=2, ladder_rungs=1))
    state.begin_step(1)
    output = model(input_ids=IDS)  # transformers makes a cache unless told not to
    with pytest.raises(ValueError, match=r"past_key_values.*model.eval\(\) to generate"):
        model(input_ids=IDS, past_key_values=output.past_key_values)
    state.begin_step(3)  # dense
    model.generate(IDS, max_new_tokens=2)


# What is refused


def test_an_unknown_architecture_is_refused_by_name() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    model = transformers.GPT2LMHeadModel(config)
    expected = r"GPT2LMHeadModel is not supported.*Llama, Mistral, Qwen2 \(and Qwen2.5\) and Qwen3"
    with pytest.raises(TypeError, match=expected):
        enable_sat(model, sat())
    with pytest.raises(TypeError, match="Linear is not supported"):
        enable_sat(nn.Linear(2, 2), sat())


class OwnLlama(transformers.LlamaForCausalLM):
    """A user's subclass."""


@pytest.mark.parametrize("kind", [OwnLlama, transformers.LlamaForSequenceClassification])
def test_other_heads_and_subclasses_are_taken(kind: type) -> None:
    model = kind(build_model("llama3").config).train()
    state = enable_sat(model, sat())
    state.begin_step(1)
    model.config.pad_token_id = 0
    forward(model)
    assert state.checksum() is not None
    disable_sat(model)
    base = build_model("llama3").model.train()
    enable_sat(base, sat()).begin_step(1)
    base(input_ids=IDS, use_cache=False)


def test_peft_is_refused_with_the_reason() -> None:
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    reason = "adapters freeze the weights that SAT trains; merge"
    with pytest.raises(TypeError, match=f"PeftModel: .*{reason}"):
        enable_sat(peft.get_peft_model(build_model("llama3"), lora, "x"), sat())
    model = build_model("llama3")
    model.add_adapter(lora)
    with pytest.raises(TypeError, match=rf"layers.0.self_attn.q_proj is a Linear: .*{reason}"):
        enable_sat(model, sat())
    # Put on later, in a loop without the Trainer, where SATCallback would see it.
    model = build_model("llama3").train()
    enable_sat(model, sat()).begin_step(1)
    wrapped = peft.get_peft_model(model, lora)
    with pytest.raises(TypeError, match=r"q_proj of 1\.attention has been replaced by a peft"):
        forward(wrapped)
    merged = peft.get_peft_model(build_model("llama3"), lora).merge_and_unload()
    enable_sat(merged, sat())


class QuantisedLinear(nn.Linear):
    """Another library's."""


def test_replaced_layers_are_refused_by_name() -> None:
    model = build_model("mistral")
    model.model.layers[1].mlp.up_proj.__class__ = QuantisedLinear
    with pytest.raises(TypeError, match=r"layers\.1\.mlp\.up_proj is a .*\.QuantisedLinear, not"):
        enable_sat(model, sat())
    model = build_model("mistral")
    model.model.layers[0].self_attn.__class__ = type(
        "FastAttention", (type(model.model.layers[0].self_attn),), {}
    )
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn is a .*FastAttention, not"):
        enable_sat(model, sat())
    model = build_model("mistral")
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(TypeError, match=r"forward of layers\.0\.mlp .*device_map.*Liger"):
        enable_sat(model, sat())
    assert not any(kind.__name__.startswith("SAT") for _, kind in classes(model))


def test_offloaded_layers_are_refused() -> None:
    """A `device_map` over several devices gives each module a forward that moves its tensors."""
    model = accelerate.cpu_offload(build_model("llama3"), execution_device=torch.device("cpu"))
    with pytest.raises(TypeError, match="load the model without device_map"):
        enable_sat(model, sat())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_multiple": 128}, "channel_multiple=128 is more than the 80 channels of an MLP"),
        ({"channel_multiple": 64, "selection_groups": 2}, "40 channels of each selection group"),
        ({"selection_groups": 3}, r"selection_groups=3 does not divide the 2 query groups"),
        ({"omission_rate": 0.01, "channel_multiple": 80}, "so that nothing is left out"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    model = build_model("llama3").train()
    before = classes(model)
    with pytest.raises(ValueError, match=message):
        enable_sat(model, sat(**settings))
    assert classes(model) == before
    enable_sat(model, sat())


def test_rounding_that_keeps_all_heads_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "megatron_sat"):
        enable_sat(build_model("llama3"), sat(omission_rate=0.1))
    assert caplog.messages == [
        "at omission_rate=0.1 rounding keeps the 6 units of each attention: nothing is left out "
        "there"
    ]


def test_twice_is_refused() -> None:
    model = build_model("llama3")
    enable_sat(model, sat())
    with pytest.raises(ValueError, match="call disable_sat first"):
        enable_sat(model, sat())


def test_neither_megatron_core_nor_deepspeed_is_imported() -> None:
    code = (
        "import sys, megatron_sat.hf; "
        "print([name for name in sys.modules if name in ('megatron', 'deepspeed')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "[]", printed.stderr
