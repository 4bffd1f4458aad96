"""Causal attention over whichever heads are kept, with grouped queries and documents.

Legend: s tokens of a sequence, b sequences, n query heads, g key/value groups, d head size.
Query head i belongs to group i // (n/g); every kernel used here takes groups as they are, so K
and V are never repeated.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_sat.ops.backend import warn_once

# cuDNN's kernel is the fastest on Hopper, forward and backward: 1.4 to 1.7 times as fast as
# flash-attn 2.8 and PyTorch's flash kernel (docs/performance.md).
_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_DETERMINISTIC = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_Attention = Callable[..., Tensor]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T, causal) @ v, head by head (paper equation 3).

    On CUDA: flash-attn where it is installed and takes the operands, else PyTorch's fused
    kernels; on Hopper GPUs and newer, whole sequences without a window go to cuDNN's. Under
    `torch.use_deterministic_algorithms` only kernels with a deterministic backward are used.

    Args:
        q: `[s, b, n, d]`; n a multiple of g, and may be 0.
        k: `[s, b, g, d]`.
        v: `[s, b, g, d]`.
        scale: Multiplies the scores before the softmax.
        window: The last so many tokens, itself included, are all that a token attends to; None:
            all.
        cu_seqlens: `[documents + 1]` int32, rising from 0 to b*s: where documents begin in the
            b*s tokens, sequence after sequence. Every sequence begins a document; empty
            documents are allowed. No token attends to another document's.
        max_seqlen: An upper bound on a document's tokens, at most and by default s.

    Returns: `[s, b, n*d]`.

    Raises: ValueError if n is not a multiple of g.
    """
    s, b, n, d = q.shape
    groups = k.shape[2]
    if n == 0:
        # Keys and values take part, so that their gradients are zeros and not missing: other ranks
        # wait for them where norms' gradients are summed over ranks.
        return torch.cat([x[:, :, :0] for x in (q, k, v)], dim=2).reshape(s, b, 0)
    if n % groups:
        raise ValueError(f"query heads ({n}) must be a multiple of key/value groups ({groups})")
    if window is not None and window >= s:
        window = None
    if cu_seqlens is None:
        out = _whole_sequences(q, k, v, scale=scale, window=window)
    else:
        out = _documents(
            q, k, v, cu_seqlens, scale=scale, window=window, max_seqlen=max_seqlen or s
        )
    return out.reshape(s, b, n * d)


def _whole_sequences(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """-> [s, b, n, d]"""
    flash = None if window is None and _cudnn_is_faster(q) else _flash_attn_for(q)
    if flash is None and window is not None:
        # The other kernels know windows only by a mask, but for that of documents.
        s, b = q.shape[:2]
        sequences = torch.arange(0, b * s + 1, s, dtype=torch.int32, device=q.device)
        return _documents(q, k, v, sequences, scale=scale, window=window, max_seqlen=s)
    if flash is None:
        return _sdpa(q, k, v, scale=scale, mask=None)
    out = flash.flash_attn_func(
        *(x.transpose(0, 1) for x in (q, k, v)),  # [b, s, heads, d]
        softmax_scale=scale,
        causal=True,
        window_size=_flash_window(window),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(0, 1)


def _flash_window(window: int | None) -> tuple[int, int]:
    """Tokens before and after; -1 is all of them."""
    return (-1 if window is None else window - 1, 0)


def _documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None,
    max_seqlen: int,
) -> Tensor:
    """-> [s, b, n, d]"""
    s, b = q.shape[:2]
    flash = _flash_attn_for(q)
    reason = _varlen_unusable(q) if flash is None else None
    if reason is not None:
        if q.is_cuda:
            warn_once(
                f"attention within documents or a window uses a mask of s x s elements ({reason})"
            )
        mask = document_mask(cu_seqlens, s=s, b=b, window=window)
        return _sdpa(q, k, v, scale=scale, mask=mask)

    packed = [x.transpose(0, 1).reshape(b * s, *x.shape[2:]) for x in (q, k, v)]
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if flash is not None:
        out = flash.flash_attn_varlen_func(
            *packed,
            *lengths,
            softmax_scale=scale,
            causal=True,
            window_size=_flash_window(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    else:
        varlen, options = _varlen()
        assert varlen is not None
        # PyTorch 2.11 takes groups without being told.
        grouped = {"enable_gqa": q.shape[2] != k.shape[2]} if "enable_gqa" in options else {}
        # A window of (-1, 0), everything before and nothing after, is how it is told causal.
        out = varlen(*packed, *lengths, scale=scale, window_size=_flash_window(window), **grouped)
    return out.view(b, s, *q.shape[2:]).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """-> [s, b, n, d]; the kernels take strides, so nothing is copied here."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d]
    with _choice_of_kernels() if q.is_cuda else contextlib.nullcontext():
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.permute(2, 0, 1, 3)


def _choice_of_kernels() -> contextlib.AbstractContextManager[None]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return sdpa_kernel(_DETERMINISTIC if deterministic else _PRIORITY, set_priority=True)


def document_mask(cu_seqlens: Tensor, *, s: int, b: int, window: int | None = None) -> Tensor:
    """`[b, 1, s, s]` bool: the keys that each query sees, causal, within its document and among
    the last `window` tokens."""
    position = torch.arange(b * s, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True).view(b, s)
    mask = (document[:, :, None] == document[:, None, :]).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return mask[:, None]


def _flash_attn_for(q: Tensor) -> ModuleType | None:
    """flash-attn if it is installed and takes operands like `q`; logs if it is but does not."""
    if not q.is_cuda:
        return None
    flash = _installed_flash_attn()
    if flash is None:
        return None
    reason = _flash_kernel_unusable(q)
    if reason is not None:
        warn_once(f"flash-attn is not used, PyTorch's attention kernels are ({reason})")
        return None
    return flash


def _cudnn_is_faster(q: Tensor) -> bool:
    """Whether cuDNN's kernel takes operands like `q`, and faster than flash-attn."""
    return (
        q.is_cuda
        and _flash_kernel_unusable(q) is None
        and q.shape[3] <= 128
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not torch.are_deterministic_algorithms_enabled()
    )


@functools.cache
def _installed_flash_attn() -> ModuleType | None:
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


@functools.cache
def _varlen() -> tuple[_Attention | None, frozenset[str]]:
    """PyTorch's variable-length attention and its options: they grew from release to release."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return cast(_Attention, varlen_attn), frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_unusable(q: Tensor) -> str | None:
    """Why PyTorch's variable-length attention cannot take operands like these, if so."""
    if not q.is_cuda:
        return "PyTorch's variable-length attention runs on CUDA alone"
    missing = sorted({"scale", "window_size"} - _varlen()[1])
    if missing:
        return f"this PyTorch's variable-length attention lacks {', '.join(missing)}"
    return _flash_kernel_unusable(q)


def _flash_kernel_unusable(q: Tensor) -> str | None:
    """Why a FlashAttention-2 kernel cannot take operands like `q`, if so."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention has no {q.dtype}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "FlashAttention needs an Ampere GPU or newer"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"FlashAttention's head size is a multiple of 8 up to 256, not {q.shape[3]}"
    return None
