"""Floating-point operations of a training step, dense and with units left out (section 2.3).

A multiply-add is two operations. Counted are the matrix products of a decoder with causal
attention; norms, activations, the embedding and the choice of units are not. All counts are of the
whole model, over all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Recompute = Literal["selective", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder that decide its cost; names are Megatron's.

    Raises:
        ValueError: for a size below 1, or heads that do not fill the query groups evenly.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """KV groups; as many as heads in multi-head attention."""
    kv_channels: int
    """Size of a head."""
    vocab_size: int
    """Columns of the output layer, padding included."""
    seq_length: int
    """Tokens that attention spans."""
    gated: bool = True
    """Whether the MLP has a gate (SwiGLU): three matrices instead of two."""
    windows: tuple[int | None, ...] | None = None
    """Sliding windows: for each layer the tokens that a token attends to, itself included, or None
    for all before it; None for no window in any layer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("gated", "windows") and value < 1:
                raise ValueError(f"{name} is {value}; valid: 1 or more")
        windows = self.windows or ()
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"windows is {windows}; valid: 1 or more, or None, for each layer")
        if self.windows is not None and len(windows) != self.num_layers:
            raise ValueError(
                f"windows are {len(windows)}; valid: one for each of the layers, {self.num_layers}"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; valid: a multiple of "
                f"num_query_groups, {self.num_query_groups}"
            )

    @property
    def is_grouped_query(self) -> bool:
        """Whether several query heads share keys and values."""
        return self.num_query_groups < self.num_attention_heads

    @property
    def attention_area(self) -> int:
        """Twice the pairs of a query and a key that a sequence computes, summed over the layers:
        of a causal layer without a window the whole square of the sequence length."""
        length = self.seq_length
        reaches = self.windows or (None,) * self.num_layers
        spans = (length if reach is None else min(reach, length) for reach in reaches)
        return sum(span * (2 * length - span) for span in spans)


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of a forward pass by component, each summed over the layers."""

    qkv: int
    core_attention: int
    proj: int
    mlp: int
    head: int

    @property
    def layers(self) -> int:
        """All but the output layer."""
        return self.qkv + self.core_attention + self.proj + self.mlp

    @property
    def total(self) -> int:
        """Layers and output layer."""
        return self.layers + self.head


def forward_flops(
    shape: ModelShape,
    *,
    tokens: int,
    heads_kept: int | None = None,
    channels_kept: int | None = None,
) -> ForwardFlops:
    """Operations of a forward pass over `tokens` tokens, in sequences of `shape.seq_length`.

    Causal attention counts half of the score matrix, and of a sliding window what lies inside it.
    Documents that are kept apart count as one sequence. The keys and values of omitted heads are
    left out too in multi-head attention, and are whole in grouped-query attention.

    Args:
        shape: the model.
        tokens: tokens in the pass, over all sequences and data-parallel ranks.
        heads_kept: query heads that a layer runs, over all ranks; None: all.
        channels_kept: MLP channels that a layer runs, over all ranks; None: all.

    Raises:
        ValueError: for more heads or channels than there are, or fewer than 0.
    """
    heads = _kept("heads_kept", heads_kept, shape.num_attention_heads)
    channels = _kept("channels_kept", channels_kept, shape.ffn_hidden_size)
    key_value_heads = shape.num_query_groups if shape.is_grouped_query else heads
    qkv_rows = (heads + 2 * key_value_heads) * shape.kv_channels
    query_rows = heads * shape.kv_channels
    mlp_matrices = 3 if shape.gated else 2
    per_layer = 2 * tokens * shape.num_layers
    return ForwardFlops(
        qkv=per_layer * shape.hidden_size * qkv_rows,
        # Scores and their product with the values, 2 S columns, half of them masked.
        core_attention=2 * tokens * query_rows * shape.attention_area // shape.seq_length,
        proj=per_layer * query_rows * shape.hidden_size,
        mlp=per_layer * mlp_matrices * shape.hidden_size * channels,
        head=2 * tokens * shape.hidden_size * shape.vocab_size,
    )


def training_flops(
    shape: ModelShape,
    *,
    tokens: int,
    heads_kept: int | None = None,
    channels_kept: int | None = None,
    recompute: Recompute | None = None,
    recompute_layers: int | None = None,
    recompute_modules: Sequence[str] = ("core_attn",),
) -> int:
    """Operations of forward and backward over `tokens` tokens: three times the forward pass.

    Recomputation adds what runs once more: "full" whole layers (four times their forward pass),
    all of them or `recompute_layers`; "selective" those of "core_attn" and "mlp" that are in
    `recompute_modules`. Arguments otherwise, and errors, as for `forward_flops`.
    """
    forward = forward_flops(
        shape, tokens=tokens, heads_kept=heads_kept, channels_kept=channels_kept
    )
    modules = {"core_attn": forward.core_attention, "mlp": forward.mlp}
    layers = shape.num_layers if recompute_layers is None else recompute_layers
    again = {
        None: 0,
        "selective": sum(modules[name] for name in recompute_modules),
        "full": forward.layers * layers // shape.num_layers,
    }
    if recompute not in again:
        raise ValueError(f"recompute is {recompute!r}; valid: None, 'selective', 'full'")
    return 3 * forward.total + again[recompute]


def _kept(name: str, kept: int | None, available: int) -> int:
    if kept is None:
        return available
    if not 0 <= kept <= available:
        raise ValueError(f"{name} is {kept}; valid: 0 to {available}")
    return kept
