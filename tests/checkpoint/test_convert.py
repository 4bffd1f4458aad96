"""Checkpoints of every ZeRO stage, read without the ranks that wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sat.checkpoint.convert import convert, main
from megatron_sat.checkpoint.deepspeed_reader import DeepSpeedWeights
from megatron_sat.testing.huggingface import write_model
from megatron_sat.testing.training import run_training, tiny_run, train, train_on_ranks
from megatron_sat.training.search import find_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


def run(model: Path, data: Path, save: Path, flags: str, *, ranks: int) -> None:
    line = (
        f"--load-hf {model} --seq-length 32 --make-vocab-size-divisible-by 16 "
        f"--tokenizer-type NullTokenizer --train-data-path {data} --num-workers 0 "
        f"--micro-batch-size 2 --train-iters 2 --lr 0.01 --eval-iters 0 --save {save} {flags}"
    )
    train_on_ranks(line.split(), ranks)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_offline_is_what_the_run_itself_wrote(
    model: Path, tiny_data: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    # Odd partitions: at two data-parallel ranks they cut parameters in two.
    live, offline = tmp_path / "live", tmp_path / "offline"
    flags = f"--zero-stage {stage} --save-hf {live} --save-hf-dtype float32"
    flags += " --tensor-model-parallel-size 2" + (" --bf16" if bf16 else "")
    run(model, tiny_data, tmp_path / "run", flags, ranks=4)
    convert(find_checkpoint(str(tmp_path / "run")), offline, dtype="float32")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (offline, live))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[name]), name
    trained = ours["model.layers.1.mlp.down_proj.weight"]
    # Master weights, not what they were rounded to; and not those of the beginning.
    assert bool((trained == trained.bfloat16().float()).all()) is False
    before = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert (trained - before).abs().max() > 1e-3
    assert (offline / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("stage", [1, 2])
def test_groups_dealt_out_to_the_ranks_are_exported_in_order(
    model: Path, tiny_data: Path, tmp_path: Path, stage: int
) -> None:
    live, settings = tmp_path / "live", tmp_path / "round_robin.json"
    # With gradients summed in bfloat16 stage 1 is the optimizer that deals out, too.
    settings.write_text(
        json.dumps(
            {
                "zero_optimization": {"round_robin_gradients": True},
                "data_types": {"grad_accum_dtype": "bf16"},
            }
        )
    )
    flags = f"--zero-stage {stage} --bf16 --save-hf {live} --save-hf-dtype float32"
    run(model, tiny_data, tmp_path / "run", f"{flags} --deepspeed_config {settings}", ranks=2)
    offline = convert(find_checkpoint(str(tmp_path / "run")), tmp_path / "offline", dtype="float32")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (offline, live))
    before = load_file(model / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert (tensor - before[name]).abs().max() < 0.1, name


@pytest.mark.parametrize(("stage", "bf16"), [(0, True), (1, False), (3, False)])
def test_frozen_parameters_are_found(
    model: Path, tiny_data: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    live = tmp_path / "live"
    flags = f"--zero-stage {stage} --train-only word_embeddings|norm --save-hf {live} "
    run(model, tiny_data, tmp_path / "run", flags + ("--bf16" if bf16 else ""), ranks=2)
    offline = convert(find_checkpoint(str(tmp_path / "run")), tmp_path / "offline")
    before = load_file(model / "model.safetensors")
    written = load_file(offline / "model.safetensors")
    during = load_file(live / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(tensor, during[name]), name
        frozen = "embed" not in name and "norm" not in name
        expected = before[name].bfloat16().float() if bf16 else before[name]
        assert torch.equal(tensor, expected) is frozen, name


def train_and_evaluate(argv: list[str]) -> torch.Tensor:
    """The loss of each of `tokens()` after training, on all ranks."""
    engine = train(argv).engine
    engine.eval()
    ids = tokens().to(engine.device)
    positions = torch.arange(ids.shape[1] - 1, device=engine.device).expand(2, -1)
    with torch.no_grad():
        return engine(ids[:, :-1], positions, None, labels=ids[:, 1:])


def tokens() -> torch.Tensor:
    return torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(3))


def test_a_model_from_scratch_becomes_a_folder(tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    flags = "--train-iters 2 --save-interval 1 --lr-warmup-iters 0 --qk-layernorm --eval-iters 0"
    argv = tiny_run(tiny_data, flags, save=tmp_path / "run")
    argv += ["--save-hf", str(tmp_path / "hf"), "--save-hf-every-save"]
    ours = run_training(train_and_evaluate, 2, argv)[0]
    folders = sorted((tmp_path / "hf").iterdir())
    assert [folder.name for folder in folders] == ["iter_0000001", "iter_0000002"]
    losses = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.model_type == "qwen3"
        with torch.no_grad():
            logits = model(tokens()[:, :-1]).logits
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), tokens()[:, 1:], reduction="none"
            )
        )
    assert (losses[1] - ours).abs().max() < 1e-4
    assert (losses[0] - ours).abs().max() > 1e-2


def test_a_missing_or_damaged_file_is_named(model: Path, tiny_data: Path, tmp_path: Path) -> None:
    run(model, tiny_data, tmp_path / "run", "--zero-stage 1", ranks=2)
    stored = find_checkpoint(str(tmp_path / "run"))
    file = stored.folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file} is damaged or cut short"):
        DeepSpeedWeights(stored)
    file.unlink()
    with pytest.raises(ValueError, match=f"{file} is missing"):
        DeepSpeedWeights(stored)
    assert main(["--load", str(tmp_path / "run"), "--save-hf", str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_verify_tells_equal_from_different(
    model: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, out = str(tmp_path / "run"), tmp_path / "out"
    run(model, tiny_data, tmp_path / "run", "--tensor-model-parallel-size 2", ranks=2)
    words = ["--text", "3 14 15 92 65 35 89 79 32 38 46 26 43 38 32 79"]
    assert (
        main(["--load", save, "--save-hf", str(out), "--verify", "--tolerance", "1e-4", *words])
        == 0
    )
    assert "equal within the tolerance of 0.0001" in capsys.readouterr().out
    path = out / "model.safetensors"
    tensors = load_file(path)
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    # Two heads of different groups in each other's place: every tensor is still well formed.
    query[:8], query[-8:] = query[-8:].clone(), query[:8].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["--load", save, "--verify", str(out), "--tolerance", "1e-4", *words]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--save-hf out", "give --load"),
        ("--load missing --save-hf out", "--load missing: there is no checkpoint"),
        ("--load run", "nothing to do"),
        ("--load run --verify --text-file none", "--text-file none cannot be read"),
        ("--load run --save-hf out --max-shard-size 0", "--max-shard-size is 0"),
    ],
)
def test_bad_command_lines(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    assert f"error: {message}" in capsys.readouterr().err
