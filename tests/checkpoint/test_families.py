"""Every family, from a random `transformers` model to our model, one training step, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_sat.testing.huggingface import FAMILY_CASES, VOCABULARY, write_model
from megatron_sat.testing.training import run_training, train

SEQUENCE = 40  # longer than every window of FAMILY_CASES

# Tensor-parallel size, ranks and ZeRO stage.
LAYOUTS = [(1, 1, 0), (1, 2, 3), (2, 2, 0), (2, 2, 3)]
# One of each family in every layout; what differs from these in numbers alone, in the hardest.
EVERYWHERE = ("llama2", "llama3.1", "mistral", "qwen2", "qwen3")
CASES = [(case, layout) for case in EVERYWHERE for layout in LAYOUTS]
CASES += [(case, LAYOUTS[-1]) for case in FAMILY_CASES if case not in EVERYWHERE]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {case: write_model(place / case, case) for case in FAMILY_CASES}


def flags(folder: Path, data: Path, *, tensor_parallel: int, zero_stage: int) -> list[str]:
    return (
        f"--load-hf {folder} --seq-length {SEQUENCE} --make-vocab-size-divisible-by 16 "
        f"--tokenizer-type NullTokenizer --train-data-path {data} --num-workers 0 "
        f"--micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 0.01 --eval-iters 0 "
        f"--tensor-model-parallel-size {tensor_parallel} --zero-stage {zero_stage}"
    ).split()


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)


def load_train_and_save(argv: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits of the loaded model, and the trained model's loss and logits of `tokens()`.

    On all ranks. The step trains on other tokens.
    """
    from megatron_sat.training import run

    logits = []
    build_engine = run.build_engine

    def build_and_look(*args: Any, **kwargs: Any) -> Any:
        engine = build_engine(*args, **kwargs)
        logits.append(evaluate(engine))
        return engine

    run.build_engine = build_and_look
    try:
        trainer = train(argv)
    finally:
        run.build_engine = build_engine
    return logits[0], evaluate(trainer.engine, labels=True), evaluate(trainer.engine)


def evaluate(engine: Any, *, labels: bool = False) -> torch.Tensor:
    """The whole vocabulary's logits, or the loss of each token."""
    engine.eval()
    ids = tokens().to(engine.device)
    positions = torch.arange(SEQUENCE, device=engine.device).expand(2, -1)
    with torch.no_grad():
        if labels:
            out = engine(ids[:, :-1], positions[:, :-1], None, labels=ids[:, 1:])
        else:
            out = engine(ids, positions, None)
    engine.train()
    if labels:
        return out
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(out) for _ in range(group.size())]
    torch.distributed.all_gather(parts, out.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize(("case", "layout"), CASES)
def test_logits_and_trained_loss_are_those_of_transformers(
    folders: dict[str, Path],
    tiny_data: Path,
    tmp_path: Path,
    case: str,
    layout: tuple[int, int, int],
) -> None:
    folder = folders[case]
    tensor_parallel, ranks, zero_stage = layout
    argv = flags(folder, tiny_data, tensor_parallel=tensor_parallel, zero_stage=zero_stage)
    argv += ["--save-hf", str(tmp_path / "out")]
    results = run_training(load_train_and_save, ranks, argv)

    expected = transformers_logits(folder)
    trained = transformers_logits(tmp_path / "out")
    loss = torch.nn.functional.cross_entropy(
        trained[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="none"
    )
    for loaded_logits, trained_loss, trained_logits in results:
        assert (loaded_logits[..., :VOCABULARY] - expected).abs().max() < 1e-4
        assert (trained_logits[..., :VOCABULARY] - trained).abs().max() < 1e-4
        assert (
            loaded_logits[..., VOCABULARY:].numel()
            and (loaded_logits[..., VOCABULARY:] < -1e30).all()
        )
        assert (trained_loss.flatten() - loss).abs().max() < 1e-4
    # The step was no small one, so that an export of the old weights would not pass.
    assert (trained - expected).abs().max() > 0.1
