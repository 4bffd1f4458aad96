"""What the steps of a configured run cost."""

from collections.abc import Mapping

from megatron_sat.flops import ModelShape, training_flops
from megatron_sat.state import SATState
from megatron_sat.training.config import TrainingConfig


def model_shape(config: TrainingConfig, padded_vocab_size: int) -> ModelShape:
    """The sizes that decide what a step costs."""
    model, windows = config.model, None
    if model.window_size is not None:
        reach = model.window_size[0] + 1  # the token itself counts here
        layers = model.window_attn_skip_freq or (1,) * model.num_layers
        windows = tuple(reach if windowed else None for windowed in layers)
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        vocab_size=padded_vocab_size,
        seq_length=model.seq_length,
        gated=model.swiglu,
        windows=windows,
    )


def step_flops(
    config: TrainingConfig, shape: ModelShape, state: SATState, *, tokens: int, rate: float
) -> int:
    """Floating-point operations of training on ``tokens`` tokens at omission ``rate``."""
    parallel = config.parallel
    kept: Mapping[str, int | None] = state.kept_units(rate)
    return training_flops(
        shape,
        tokens=tokens,
        heads_kept=kept["attention"],
        channels_kept=kept["mlp"],
        recompute=parallel.recompute_granularity,
        recompute_layers=(
            parallel.recompute_num_layers if parallel.recompute_method == "block" else None
        ),
        recompute_modules=parallel.recompute_modules or ("core_attn",),
    )
