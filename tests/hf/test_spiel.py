"""SpIEL against a dense reference of the same update, and what it leaves behind."""

import copy
import gc
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from megatron_sat.hf.spiel import (
    SpielConfig,
    SpielLinear,
    disable_spiel,
    enable_spiel,
    load_deltas,
    save_deltas,
    spiel_linears,
)
from megatron_sat.hf.spiel_callback import SpielCallback
from megatron_sat.testing.finetuning import forget_accelerate, padded_records
from megatron_sat.testing.huggingface import build_model, write_model
from megatron_sat.testing.training import run_training

CONFIG = SpielConfig(density=0.05, interval=5, accumulation=2, replaced=0.3)
LEARNING_RATE, WEIGHT_DECAY, BETAS = 3e-3, 2.0, (0.9, 0.999)


def train(
    model: Any, output: Path, *, resume: Path | None = None, callbacks: Any = (), **changes: Any
) -> Trainer:
    """14 steps, the last of three growths behind the thirteenth."""
    forget_accelerate()
    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 14,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(values | changes)),
        train_dataset=padded_records(),
        callbacks=[SpielCallback(CONFIG), *callbacks],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def deltas(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Positions in ascending order, and the values at them."""
    result = {}
    for name, linear in spiel_linears(model):
        order = linear.delta_indices.argsort()
        result[name] = (linear.delta_indices[order], linear.delta_values.detach()[order])
    return result


class DenseReference:
    """The same training with dense deltas, dense Adam moments and dense gradients."""

    def __init__(self, model: Any, positions: dict[str, torch.Tensor]) -> None:
        self.model = model
        linears = dict(model.model.named_modules())
        self.linears = {name: linears[name] for name in positions}
        self.base = {name: m.weight.detach().clone() for name, m in self.linears.items()}
        self.active = {}
        for name, index in positions.items():
            mask = torch.zeros(self.base[name].numel(), dtype=torch.bool)
            mask[index.long()] = True
            self.active[name] = mask.view_as(self.base[name])
        zeros = {name: torch.zeros_like(weight) for name, weight in self.base.items()}
        self.delta, self.first, self.second = (copy.deepcopy(zeros) for _ in range(3))
        self.sums, self.squares = (copy.deepcopy(zeros) for _ in range(2))
        self.candidates = {name: torch.zeros_like(mask) for name, mask in self.active.items()}

    def gradients(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        found = []
        for batch in micro_batches:
            self.model.zero_grad()
            logits = self.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            (
                cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum") / total
            ).backward()
            found.append({name: m.weight.grad.clone() for name, m in self.linears.items()})
        return found

    def step(self, number: int, steps: int, micro_batches: list[dict[str, Any]]) -> None:
        parts = self.gradients(micro_batches)
        whole = {name: sum(part[name] for part in parts) for name in self.linears}
        norm = sum((whole[n] * self.active[n]).square().sum() for n in whole).sqrt()
        position = (number - 1) % CONFIG.interval
        for name, gradient in whole.items():
            active = self.active[name]
            if position == 0:
                best = parts[0][name].abs().flatten().topk(int(active.sum())).indices
                self.candidates[name] = torch.zeros_like(active).flatten().index_fill(0, best, 1)
                self.candidates[name] = self.candidates[name].view_as(active).bool()
                self.sums[name].zero_()
                self.squares[name].zero_()
            elif position <= CONFIG.accumulation:
                self.sums[name] += gradient
                self.squares[name] += gradient**2
            clipped = gradient * active / max(1.0, float(norm) + 1e-6)
            for moment, value, beta in (
                (self.first, clipped, BETAS[0]),
                (self.second, clipped**2, BETAS[1]),
            ):
                moment[name] = (beta * moment[name] + (1 - beta) * value) * active
            first = self.first[name] / (1 - BETAS[0] ** number)
            second = self.second[name] / (1 - BETAS[1] ** number)
            self.delta[name] *= 1 - LEARNING_RATE * WEIGHT_DECAY
            self.delta[name] -= LEARNING_RATE * first / (second.sqrt() + 1e-8) * active
        if position == CONFIG.accumulation:
            share = 1.0 if number < CONFIG.interval else CONFIG.replaced * (1 - number / steps)
            for name in self.linears:
                self.grow(name, share, number)
        for name, linear in self.linears.items():
            linear.weight.data.copy_(self.base[name] + self.delta[name])

    def grow(self, name: str, share: float, number: int) -> None:
        active, delta = self.active[name], self.delta[name]
        count = int(share * int(active.sum()))
        by_size = torch.where(active, delta.abs(), torch.inf).flatten()
        dropped = set(by_size.argsort(stable=True)[:count].tolist())
        staying = set(active.flatten().nonzero().flatten().tolist()) - dropped
        candidates = set(self.candidates[name].flatten().nonzero().flatten().tolist()) - staying
        sums = self.sums[name].flatten()
        grown = set(sorted(candidates, key=lambda i: -abs(float(sums[i])))[:count])
        order = by_size.argsort(stable=True)[:count].tolist()
        leaving = [i for i in order if i not in grown][: len(grown - dropped)]
        coming = list(grown - dropped)
        for i in leaving:
            for tensor in (active, delta, self.first[name], self.second[name]):
                tensor.view(-1)[i] = 0
        for i in coming:
            active.view(-1)[i] = True
            mean = sums[i] / CONFIG.accumulation
            square = self.squares[name].flatten()[i] / CONFIG.accumulation
            self.first[name].view(-1)[i] = mean * (1 - BETAS[0] ** number)
            self.second[name].view(-1)[i] = square * (1 - BETAS[1] ** number)


def test_training_is_that_of_a_dense_reference(tmp_path: Path) -> None:
    model = build_model("llama3")
    dense = copy.deepcopy(model).train()
    enable_spiel(model, CONFIG)
    start = {name: linear.delta_indices.clone() for name, linear in spiel_linears(model)}
    batches: list[dict[str, Any]] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        batches.append({n: kwargs[n].clone() for n in ("input_ids", "attention_mask", "labels")})

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    train(model, tmp_path)
    hook.remove()
    assert len(batches) == 28
    reference = DenseReference(dense, start)
    for number in range(1, 15):
        reference.step(number, 14, batches[2 * number - 2 : 2 * number])
    for name, linear in spiel_linears(model):
        mask = torch.zeros(linear.weight.numel(), dtype=torch.bool)
        mask[linear.delta_indices.long()] = True
        assert torch.equal(mask.view_as(linear.weight), reference.active[name]), name
        assert not set(linear.delta_indices.tolist()) <= set(start[name].tolist())
        merged = linear.merged(torch.float32)
        change, expected = merged - reference.base[name], reference.delta[name]
        assert (change - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_dense_one_with_its_deltas(bias: bool) -> None:
    model = build_model("llama3", changes={"attention_bias": bias})
    enable_spiel(model, CONFIG)
    linear = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        linear.delta_values.normal_()
    dense = torch.nn.Linear(linear.in_features, linear.out_features, bias=bias)
    with torch.no_grad():
        dense.weight.copy_(linear.merged(torch.float32))
        if bias:
            dense.bias.copy_(linear.bias)
    inputs = [torch.randn(2, 5, 48).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0])
    weights = torch.randn(2, 5, linear.out_features)
    for module, x in zip((linear, dense), inputs, strict=True):
        (module(x) * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    at = dense.weight.grad.flatten()[linear.delta_indices.long()]
    torch.testing.assert_close(linear.delta_values.grad, at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear(inputs[0])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(inputs[0]), rtol=3e-2, atol=3e-2)


def test_memory_is_in_the_order_of_the_deltas(tmp_path: Path) -> None:
    model = build_model("llama3")
    enable_spiel(model, CONFIG)

    def of_weights() -> int:
        gc.collect()
        sizes = {linear.weight.shape for _, linear in spiel_linears(model)}
        tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
        return sum(t.shape in sizes or t.mT.shape in sizes for t in tensors if t.dim() == 2)

    before = of_weights()
    seen = []

    class Count(TrainerCallback):
        """In the middle of a step, when gradients are there."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(of_weights())

    train(model, tmp_path, callbacks=[Count()], max_steps=4)
    assert seen == [before] * 4
    for _, linear in spiel_linears(model):
        assert linear.weight.grad is None and not linear.weight.requires_grad
        held = [linear.delta_values, *(b for b in linear.buffers())]
        assert {t.numel() for t in held} == {int(linear.weight.numel() * CONFIG.density)}


def test_saved_loaded_and_merged(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    untouched = copy.deepcopy(model)
    enable_spiel(model, CONFIG)
    train(model, tmp_path, max_steps=4)
    ids = torch.arange(20)[None]
    trained = model.eval()(ids).logits.detach()
    assert not torch.allclose(trained, untouched(ids).logits, atol=1e-3)
    save_deltas(model, tmp_path / "deltas", CONFIG)
    loaded = copy.deepcopy(untouched)
    assert load_deltas(loaded, tmp_path / "deltas") == CONFIG
    assert torch.equal(loaded.eval()(ids).logits, trained)
    disable_spiel(model)
    torch.testing.assert_close(model(ids).logits, trained, rtol=0, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="has deltas of other linears"):
        load_deltas(build_model("qwen2", changes={"num_hidden_layers": 1}), tmp_path / "deltas")


@pytest.mark.parametrize("stop", [6, 7])
def test_a_run_resumed_in_a_collection_is_the_one_never_stopped(tmp_path: Path, stop: int) -> None:
    folder = write_model(tmp_path / "model", "llama2")
    models = []
    for resume in (None, tmp_path / f"checkpoint-{stop}"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        enable_spiel(model, CONFIG)
        saving = {"save_strategy": "steps", "save_steps": stop} if resume is None else {}
        train(model, tmp_path, resume=resume, max_steps=10, **saving)
        models.append(deltas(model))
    for name, (positions, values) in models[0].items():
        assert torch.equal(positions, models[1][name][0]) and torch.equal(
            values, models[1][name][1]
        )


def on_rank(folder: Path, output: Path, accumulation: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    enable_spiel(model, CONFIG)
    trainer = train(model, output, gradient_accumulation_steps=accumulation, max_steps=9)
    return type(trainer.model_wrapped).__name__, deltas(model)


def test_two_ranks_are_one_with_the_same_micro_batches(tmp_path: Path) -> None:
    """Rank 0's micro-batch is the first of the two that one rank accumulates."""
    folder = write_model(tmp_path / "model", "llama2")
    ((_, expected),) = run_training(on_rank, 1, folder, tmp_path, 2)
    for wrapper, found in run_training(on_rank, 2, folder, tmp_path, 1):
        assert wrapper == "DistributedDataParallel"
        for name, (positions, values) in expected.items():
            assert torch.equal(found[name][0], positions), name
            torch.testing.assert_close(found[name][1], values, rtol=1e-3, atol=1e-6)


def test_what_spiel_refuses(tmp_path: Path) -> None:
    for changes, message in (
        ({"density": 1.0}, "density is 1.0"),
        ({"interval": 5, "accumulation": 5}, "interval is 5; valid: more than accumulation, 5"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"replaced": 1.5}, "replaced is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SpielConfig(**({"density": 0.1} | changes))
    model = build_model("llama3")
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.k_proj with 1536 weights gets no delta"
    ):
        enable_spiel(model, SpielConfig(density=0.0005))
    with pytest.raises(ValueError, match="call enable_spiel first"):
        train(model, tmp_path)
    with pytest.raises(TypeError, match="is not supported by SAT"):
        enable_spiel(torch.nn.Linear(2, 2), CONFIG)
    enabled = copy.deepcopy(model)
    enable_spiel(enabled, CONFIG)
    for optimizer in ("adafactor", "sgd"):
        with pytest.raises(ValueError, match="SpIEL sets the moments of deltas that grow, which"):
            train(enabled, tmp_path, optim=optimizer)
    with (
        mock.patch.dict(os.environ, ACCELERATE_USE_FSDP="true"),
        pytest.raises(ValueError, match="cannot move under DeepSpeed or FSDP"),
    ):
        train(enabled, tmp_path)
    assert not any(isinstance(module, SpielLinear) for module in model.modules())
