"""Other people's GPU kernels for our operators: PyTorch's fused ones, fla, mamba-ssm, causal-conv1d, Liger.

Each in the layout that its own models call it in, arranged once and outside the timing. A package that is not
installed, or refuses the call, is named with its reason and stops nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star.bench.peers import (
    CHANNELS_FIRST,
    HEADS_FIRST,
    Peer,
    channels_first,
    channels_last,
    decay_before_beta,
    rfft_convolution,
)

__all__ = ["GPU_PEERS"]

_GPU = ("cuda",)


def _from(module: str, name: str) -> Callable[[], Callable[..., Any]]:
    """Finds a function of a package; a missing one raises ImportError or AttributeError."""
    return lambda: getattr(importlib.import_module(module), name)


# --------------------------------------------------------------------------------------------------------
# Convolutions


def _causal_conv1d() -> Callable[..., Any]:
    function = _from("causal_conv1d", "causal_conv1d_fn")()
    return lambda x, weight: function(x, weight.to(x.dtype))


def _gated_causal_conv1d() -> Callable[..., Any]:
    convolve = _causal_conv1d()
    return lambda b, c, x, weight: c * convolve(b * x, weight)


def _fft(x: Tensor, kernel: Tensor) -> Tensor:
    """torch.fft takes float32; the sums of a long convolution want it too."""
    return rfft_convolution(x.float(), kernel.float()).to(x.dtype)


def _gated_fft(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    return c * _fft(b * x, kernel)


# --------------------------------------------------------------------------------------------------------
# Recurrences


def _with_log_decay(decay: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return x, decay.float().log().to(decay.dtype)


def _mamba(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> tuple[Any, ...]:
    first = channels_first(x, dt, B, C, z)
    return first[0], first[1], A, first[2], first[3], D, first[4]


# --------------------------------------------------------------------------------------------------------
# Attention


def _sdpa(backend: str) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attend

    return find


def _sdpa_difference() -> Callable[..., Any]:
    attend = _sdpa("FLASH_ATTENTION")()
    return lambda q1, k1, q2, k2, v, lam: attend(q1, k1, v) - lam * attend(q2, k2, v)


def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        length = q.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(q, k, v, block_mask=masks[length])

    return attend


# --------------------------------------------------------------------------------------------------------
# Norms, gates, losses


def _liger(module: str, name: str, *constants: Any) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        function: Any = _from(f"liger_kernel.ops.{module}", name)()
        return lambda *arguments: function.apply(*arguments, *constants)

    return find


def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x, weight.to(x.dtype)


def _gpu_peer(name: str, find: Callable[[], Callable[..., Any]], **layout: Any) -> Peer:
    return Peer(name, find, devices=_GPU, **layout)


GPU_PEERS: dict[str, tuple[Peer, ...]] = {
    "short_conv": (_gpu_peer("causal-conv1d", _causal_conv1d, **CHANNELS_FIRST),),
    "gated_short_conv": (_gpu_peer("causal-conv1d, composed", _gated_causal_conv1d, **CHANNELS_FIRST),),
    "long_conv": (_gpu_peer("torch.fft", lambda: _fft, **CHANNELS_FIRST),),
    "gated_long_conv": (_gpu_peer("torch.fft", lambda: _gated_fft, **CHANNELS_FIRST),),
    "linear_scan": (
        _gpu_peer("fla chunk_hgrn", _from("fla.ops.hgrn", "chunk_hgrn"), arrange=_with_log_decay),
    ),
    "selective_scan": (
        _gpu_peer(
            "mamba-ssm selective_scan_fn",
            _from("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
            arrange=_mamba,
            restore=channels_last,
        ),
    ),
    "gated_linear_attention": (
        _gpu_peer("fla chunk_simple_gla", _from("fla.ops.simple_gla", "chunk_simple_gla")),
    ),
    "gated_delta_rule": (
        _gpu_peer(
            "fla chunk_gated_delta_rule",
            _from("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
            arrange=decay_before_beta,
        ),
    ),
    "attention": (
        _gpu_peer("torch SDPA, flash", _sdpa("FLASH_ATTENTION"), **HEADS_FIRST),
        _gpu_peer("torch SDPA, cuDNN", _sdpa("CUDNN_ATTENTION"), **HEADS_FIRST),
        _gpu_peer("FlexAttention", _flex_attention, **HEADS_FIRST),
    ),
    "diff_attention": (_gpu_peer("two SDPA flash calls and a subtraction", _sdpa_difference, **HEADS_FIRST),),
    "glu": (_gpu_peer("Liger swiglu", _liger("swiglu", "LigerSiLUMulFunction")),),
    "rms_norm": (
        _gpu_peer(
            "Liger rms_norm",
            _liger("rms_norm", "LigerRMSNormFunction", 1e-6, 0.0, "llama", False),
            arrange=_rms_norm,
        ),
    ),
    "rope": (
        _gpu_peer("fla rotary_embedding", _from("fla.modules.rotary", "rotary_embedding"), constants=(1, 2)),
    ),
    "linear_cross_entropy": (
        _gpu_peer(
            "Liger fused_linear_cross_entropy",
            _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"),
            constants=(2,),
        ),
    ),
}
