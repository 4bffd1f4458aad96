"""`finetune.py --quality`: a small base model tuned by each method, and asked."""

import time
from collections.abc import Sequence
from pathlib import Path

import finetune_task as task
import torch
from finetune_settings import settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from megatron_sat.finetuning.arguments import parse
from megatron_sat.finetuning.run import finetune
from megatron_sat.stopping import RanksStopped

TRAINED, HELD_OUT = 4096, 512
BATCH = 64
# For a model this small; the command's defaults are for 7B. With --letters 4 SAT's is the best of
# 3e-4, 1e-3 and 3e-3, and full fine-tuning does as well at 3e-3; the others were not searched.
LEARNING_RATES = {"full": 1e-3, "sat": 1e-3, "lora": 3e-3, "ia3": 1e-1, "spiel": 1e-2}
MORE_FLAGS = {
    "lora": "--lora_r 8 --lora_alpha 16",
    "spiel": "--spiel_density 0.1 --weight_decay 0",
}


def measure(
    methods: Sequence[str], folder: Path, *, steps: int, base_steps: int, letters: int, seeds: int
) -> list[dict[str, object]]:
    """One line for the base model, and one for each method and seed."""
    base = folder / "base"
    train_base(base, base_steps, letters)
    held_out, train = folder / "held_out.jsonl", folder / "train.jsonl"
    prompts = task.write_records(held_out, HELD_OUT, letters=letters, seed=1)
    task.write_records(train, TRAINED, letters=letters, seed=2, without=frozenset(prompts))
    tasks = folder / "tasks"
    name = task.write_harness_task(tasks, held_out, seed=3)
    rows = [row("base", base, held_out, tasks, name, steps=0, seed=0)]
    for method in methods:
        for seed in range(seeds):
            output = folder / f"{method}-{seed}"
            try:
                figures = tune(method, base, train, held_out, output, steps=steps, seed=seed)
            except (ValueError, RanksStopped) as error:
                print(f"{method}: left out: {error}", flush=True)
                break
            rows.append(
                row(method, output / "tuned", held_out, tasks, name, steps=steps, seed=seed)
                | figures
            )
    return [line | {"letters": letters} for line in rows]


def row(
    method: str, model: Path, held_out: Path, tasks: Path, name: str, *, steps: int, seed: int
) -> dict[str, object]:
    """What a model answers."""
    return {
        "measured": "quality",
        "method": method,
        "seed": seed,
        "steps": steps,
        "held_out_accuracy": exact_answers(model, held_out),
        "harness_accuracy": harness_accuracy(model, tasks, name),
    }


def tune(
    method: str, base: Path, train: Path, held_out: Path, output: Path, *, steps: int, seed: int
) -> dict[str, object]:
    """Run the command; its time, memory and losses."""
    flags = (
        f"--model_name_or_path {base} --train_file {train} --validation_file {held_out} "
        f"--output_dir {output} --method {method} --max_steps {steps} "
        f"--per_device_train_batch_size {BATCH} --per_device_eval_batch_size {BATCH} "
        f"--learning_rate {LEARNING_RATES[method]} --lr_scheduler_type cosine --warmup_steps 10 "
        f"--logging_steps 10 --save_strategy no --disable_tqdm true --seed {seed} "
        f"--report_to none {MORE_FLAGS.get(method, '')}"
    ).split()
    if method == "sat":  # the paper's setting, and the multiple of a small model
        flags += f"--sat-omission-rate 0.96 --sat-decay-start-step {steps // 2}".split()
        flags += f"--sat-ladder-rungs 1 --sat-channel-multiple 1 --sat-seed {seed}".split()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = finetune(flags)
    history = trainer.state.log_history
    seconds = next(line["train_runtime"] for line in history if "train_runtime" in line)
    tokens = sum(trainer.train_dataset.lengths()) / len(trainer.train_dataset) * BATCH * steps
    losses = [line["loss"] for line in history if "loss" in line]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else ""
    return {
        **settings(parse(flags)),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "run_peak_gib": peak,
        "training_loss": round(losses[-1], 4),
        "held_out_loss": round(
            [line["eval_loss"] for line in history if "eval_loss" in line][-1], 4
        ),
    }


def train_base(folder: Path, steps: int, letters: int) -> None:
    """Write a small Llama that continues the lines of `finetune_task.base_text`."""
    vocabulary = task.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.pad_token = tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    began = time.perf_counter()
    for step in range(steps):
        lines = [task.base_text(1_000_000 + step * BATCH + i, letters) for i in range(BATCH)]
        batch = tokenizer(lines, add_special_tokens=False, padding=True, return_tensors="pt")
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        # Letters before "=" are drawn: there is nothing in them to learn.
        equals = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("=")).cumsum(dim=1)
        labels = batch["input_ids"].masked_fill(
            (equals == 0) | (batch["attention_mask"] == 0), -100
        )
        loss = model(**{n: batch[n] for n in ("input_ids", "attention_mask")}, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"base: step {step + 1}, loss {loss.item():.4f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    model.save_pretrained(folder)


@torch.no_grad()
def exact_answers(folder: Path, held_out: Path) -> float:
    """Share of the prompts to which the model's likeliest tokens are the whole response and the
    end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    right = 0
    records = task.read_records(held_out)
    for record in records:
        asked = [{"role": "user", "content": record["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(record["response"] + " </s>", add_special_tokens=False)["input_ids"]
        # Greedy decoding gives the answer exactly if each of its tokens is likeliest after those
        # before it.
        logits = model(torch.tensor([tokens + answer], device=model.device)).logits[0]
        right += logits[len(tokens) - 1 : -1].argmax(dim=-1).tolist() == answer
    return round(right / len(records), 4)


def harness_accuracy(model: Path, tasks: Path, name: str) -> float | str:
    """Accuracy on a task of lm-evaluation-harness; nothing where it is not installed."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        return ""
    harness = HFLM(
        pretrained=str(model),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32",
        batch_size=BATCH,
    )
    results = lm_eval.simple_evaluate(
        model=harness,
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return round(results["results"][name]["acc,none"], 4)
