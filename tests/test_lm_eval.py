"""examples/lm_eval.sh: the real harness, offline, on a model that the trainer exported."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.testing.huggingface import write_model, write_tokenizer
from megatron_sat.testing.training import train_on_ranks, write_indexed_data

SCRIPT = Path(__file__).parents[1] / "examples" / "lm_eval.sh"
QUESTIONS = [
    {"country": "France", "capital": 0, "choices": ["Paris", "Rome"]},
    {"country": "Italy", "capital": 1, "choices": ["Paris", "Rome"]},
    {"country": "Spain", "capital": 1, "choices": ["Bern", "Madrid"]},
    {"country": "Japan", "capital": 0, "choices": ["Tokyo", "Oslo"]},
]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_target: capital
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed (pip install 'lm-eval[hf]')",
)
def test_the_harness_measures_what_transformers_computes(tmp_path: Path) -> None:
    source, model = tmp_path / "source", tmp_path / "model"
    write_tokenizer(write_model(source, "llama2"))
    data = write_indexed_data(tmp_path / "numbers")
    train_on_ranks(
        f"--load-hf {source} --save-hf {model} --save {tmp_path / 'run'} --train-data-path {data} "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {source} --num-workers 0 "
        "--seq-length 32 --micro-batch-size 2 --train-iters 3 --lr 0.01 --eval-iters 0".split(),
        1,
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tasks / "capitals.jsonl").write_text(lines)
    (tasks / "capitals.yaml").write_text(TASK.replace("DATA", str(tasks / "capitals.jsonl")))
    output = tmp_path / "results"
    flags = ["--include_path", str(tasks), "--device", "cpu", "--log_samples"]
    done = subprocess.run(
        [SCRIPT, *flags],
        env=os.environ
        | {"MODEL": str(model), "TASKS": "capitals", "OUTPUT": str(output), "DTYPE": "float32"}
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_capitals_*.jsonl")
    measured = [json.loads(line) for line in samples.read_text().splitlines()]

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = 0
    for question, sample in zip(QUESTIONS, measured, strict=True):
        scores = []
        context = tokenizer(f"The capital of {question['country']} is")["input_ids"]
        for choice in question["choices"]:
            answer = tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = network(torch.tensor([context + answer])).logits[0]
            log = torch.log_softmax(logits, dim=-1)[len(context) - 1 : -1]
            scores.append(float(log.gather(1, torch.tensor(answer)[:, None]).sum()))
        heard = [float(answer[0][0]) for answer in sample["resps"]]
        assert heard == pytest.approx(scores, rel=1e-4)
        right += scores.index(max(scores)) == question["capital"]
    accuracy = json.loads(result.read_text())["results"]["capitals"]["acc,none"]
    assert accuracy == right / len(QUESTIONS)


def test_a_run_is_exported_first(tmp_path: Path) -> None:
    for name in ("python", "lm_eval"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\nprintf "{name} %s\\n" "$*"\n')
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)

    def run(*flags: str, **variables: str) -> tuple[int, list[str], str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [SCRIPT, *flags],
            env={"PATH": path} | variables,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    save, output = tmp_path / "a run", tmp_path / "out"
    save.mkdir()
    (save / "latest").touch()
    given = {"MODEL": str(save), "TASKS": "a,b", "OUTPUT": str(output)}
    tool = SCRIPT.parents[1] / "tools" / "convert_checkpoint.py"
    harness = (
        f"lm_eval run --model hf --model_args pretrained={output}/model,dtype=auto "
        f"--tasks a,b --output_path {output} --limit 5"
    )
    export = f"python {tool} --load {save} --save-hf {output}/model"
    assert tool.exists()
    assert run("--limit", "5", **given) == (0, [export, harness], "")
    assert run("--limit", "5", CKPT_STEP="7", **given)[1] == [f"{export} --ckpt-step 7", harness]
    assert run("--limit", "5", LOAD_HF="m", **given)[1] == [f"{export} --load-hf m", harness]
    (output / "model").mkdir()
    assert run("--limit", "5", **given)[1] == [harness]
    (save / "latest").unlink()
    shutil.rmtree(output)
    (save / "global_step7").mkdir()  # by which a run is known as well
    assert run("--limit", "5", **given)[1] == [export, harness]
    (save / "global_step7").rmdir()
    shutil.rmtree(output)
    assert run("--limit", "5", **given)[1] == [harness.replace(f"{output}/model", str(save))]
    for missing in given:
        code, lines, error = run(**{name: v for name, v in given.items() if name != missing})
        assert code == 2 and not lines and f"  {missing} " in error
