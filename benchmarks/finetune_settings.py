"""What a method of `finetune.py` was run with, in columns of its table."""

from megatron_sat.finetuning.arguments import CommandLine


def settings(command: CommandLine) -> dict[str, object]:
    """Of a method's own flags, defaults included, and of the dtypes of weights and arithmetic."""
    rate = command.sat.sat_omission_rate
    own = command.own
    return {
        "omission_rate": "" if rate is None else rate,
        "lora_rank": "" if own.lora_r is None else own.lora_r,
        "density": "" if own.spiel_density is None else own.spiel_density,
        "weights": own.dtype,
        "autocast": bool(command.training["bf16"]),
    }
