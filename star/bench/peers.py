"""Other people's forms of our operators: PyTorch's own operators composed, transformers, fla.

A peer gets the values of our case in the layout in which it is called in its own models, arranged once and
outside the timing. Peers of packages are reached where they are installed. transformers' functions carry
decorators that look for compiled kernels on a hub; `inspect.unwrap` reaches the pure PyTorch underneath.
fla's packages import Triton, but the files with its plain definitions load alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PEERS", "Peer", "load"]

CHUNK = 64
"""Tokens a chunk, of the peers that take the number: that of transformers' and fla's own defaults."""


def _same(*arguments: Any) -> tuple[Any, ...]:
    return arguments


def _as_it_is(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Peer:
    """One peer of one operator.

    Args:
        name: as a table shows it.
        find: gives its function; raises ImportError or AttributeError where it is not installed.
        arrange: from our case's arguments to the peer's.
        restore: from its result to ours.
        constants: positions of its arguments without a gradient.
        devices: on which it is timed. Loops over tokens in Python would take minutes on a GPU, and GPU
            packages run on no CPU.
    """

    name: str
    find: Callable[[], Callable[..., Any]]
    arrange: Callable[..., tuple[Any, ...]] = _same
    restore: Callable[[Any], Tensor] = _as_it_is
    constants: tuple[int, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")


def load(peer: Peer) -> Callable[..., Any] | str:
    """The peer's function, or why there is none here."""
    try:
        return peer.find()
    except (ImportError, AttributeError) as error:
        return str(error).splitlines()[0]


def _transformers(model: str, name: str) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        return inspect.unwrap(getattr(module, name))

    return find


def _fla(family: str, name: str) -> Callable[[], Callable[..., Any]]:
    def find() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(_fla_definitions(family), name)
        return function

    return find


def _fla_definitions(family: str) -> ModuleType:
    package = importlib.util.find_spec("fla")
    places = package.submodule_search_locations if package is not None else None
    if not places:
        raise ImportError("No module named 'fla'")
    spec = importlib.util.spec_from_file_location(
        f"_fla_{family}_naive", Path(places[0], "ops", family, "naive.py")
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"fla has no definition of {family}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _composed(name: str, function: Callable[..., Any], **layout: Any) -> Peer:
    return Peer(name, lambda: function, **layout)


# --------------------------------------------------------------------------------------------------------
# Layouts


def _one(value: Tensor) -> Tensor:
    """(B, L, D) to a contiguous (B, D, L)."""
    return value.transpose(1, 2).contiguous()


def channels_first(*arguments: Any) -> tuple[Any, ...]:
    return tuple(
        _one(value) if isinstance(value, Tensor) and value.dim() == 3 else value for value in arguments
    )


def channels_last(result: Any) -> Tensor:
    return _as_it_is(result).transpose(1, 2)


def _heads_first(*arguments: Tensor) -> tuple[Tensor, ...]:
    """(B, L, H, Dh) to (B, H, L, Dh), the order of `F.scaled_dot_product_attention`."""
    return tuple(value.transpose(1, 2).contiguous() if value.dim() == 4 else value for value in arguments)


# --------------------------------------------------------------------------------------------------------
# Compositions of PyTorch's operators


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    return F.conv1d(x, weight[:, None], padding=taps - 1, groups=weight.shape[0])[..., : x.shape[-1]]


def _short_conv_last(x: Tensor, weight: Tensor) -> Tensor:
    return _conv(x.transpose(1, 2), weight).transpose(1, 2)


def _gated_short_conv_first(b: Tensor, c: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return c * _conv(b * x, weight)


def _gated_short_conv_last(b: Tensor, c: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return c * _short_conv_last(b * x, weight)


def rfft_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def _rfft_last(x: Tensor, kernel: Tensor) -> Tensor:
    length = x.shape[1]
    spectrum = torch.fft.rfft(x, n=2 * length, dim=1) * torch.fft.rfft(kernel, n=2 * length).mT
    return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]


def _gated_rfft_first(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    return c * rfft_convolution(b * x, kernel)


def _gated_rfft_last(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    return c * _rfft_last(b * x, kernel)


def _scan_by_index(decay: Tensor, x: Tensor) -> Tensor:
    """As such loops are usually written; backward adds a whole gradient of zeros for each token."""
    state = torch.zeros_like(x[:, 0])
    states = []
    for token in range(x.shape[1]):
        state = decay[:, token] * state + x[:, token]
        states.append(state)
    return torch.stack(states, dim=1)


def _scan_unbound(decay: Tensor, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    states = []
    for decay_t, x_t in zip(decay.unbind(1), x.unbind(1), strict=True):
        state = decay_t * state + x_t
        states.append(state)
    return torch.stack(states, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa_difference(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    return _sdpa(q1, k1, v) - lam * _sdpa(q2, k2, v)


def _sdpa_over_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _cache_heads_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """One length for all sequences, as the case has it: then no mask is needed."""
    return q[:, :, None], *_heads_first(k, v)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _logits_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets)


# --------------------------------------------------------------------------------------------------------
# transformers' arguments


def _rnn_scan() -> Callable[..., Any]:
    module = importlib.import_module("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    scan = inspect.unwrap(module.RecurrentGemmaRglru._rnn_scan)
    return lambda decay, x, reset: scan(None, x, decay, reset, None)


def _with_no_reset(decay: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return decay, x, torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)


def _chunk_scan() -> Callable[..., Any]:
    scan = _transformers("mamba2", "mamba2_chunk_scan")()
    return lambda *arguments: scan(*arguments, CHUNK)


def _as_mamba2(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """Mamba-2 has A dt for the decay and dt x for the values: A = -1, dt = -log_decay."""
    dt = -log_decay
    minus_one = -torch.ones(v.shape[2], device=v.device)
    return v / dt[..., None], dt, minus_one, k, q * q.shape[-1] ** -0.5


def decay_before_beta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    return q, k, v, log_decay, beta


# --------------------------------------------------------------------------------------------------------
# The table

_CPU = ("cpu",)
CHANNELS_FIRST: dict[str, Any] = {"arrange": channels_first, "restore": channels_last}
HEADS_FIRST: dict[str, Any] = {"arrange": _heads_first, "restore": channels_last}

PEERS: dict[str, tuple[Peer, ...]] = {
    "short_conv": (
        Peer("transformers causal_conv1d_fn", _transformers("mamba", "causal_conv1d_fn"), **CHANNELS_FIRST),
        _composed("composed, (B, L, D)", _short_conv_last),
    ),
    "gated_short_conv": (
        _composed("composed, (B, D, L)", _gated_short_conv_first, **CHANNELS_FIRST),
        _composed("composed, (B, L, D)", _gated_short_conv_last),
    ),
    "long_conv": (
        _composed("rfft, (B, D, L)", rfft_convolution, **CHANNELS_FIRST, devices=_CPU),
        _composed("rfft, (B, L, D)", _rfft_last, devices=_CPU),
    ),
    "gated_long_conv": (
        _composed("rfft, (B, D, L)", _gated_rfft_first, **CHANNELS_FIRST, devices=_CPU),
        _composed("rfft, (B, L, D)", _gated_rfft_last, devices=_CPU),
    ),
    "linear_scan": (
        _composed("Python loop, by index", _scan_by_index, devices=_CPU),
        _composed("Python loop, unbound", _scan_unbound, devices=_CPU),
        Peer("transformers RecurrentGemma scan", _rnn_scan, _with_no_reset, devices=_CPU),
    ),
    "selective_scan": (
        Peer(
            "transformers mamba_selective_scan",
            _transformers("mamba", "mamba_selective_scan"),
            channels_first,
            channels_last,
            devices=_CPU,
        ),
    ),
    "gated_linear_attention": (
        Peer("transformers mamba2_chunk_scan", _chunk_scan, _as_mamba2, constants=(2,), devices=_CPU),
        Peer("fla naive_chunk_simple_gla", _fla("simple_gla", "naive_chunk_simple_gla"), devices=_CPU),
        Peer("fla naive_parallel_simple_gla", _fla("simple_gla", "naive_parallel_simple_gla"), devices=_CPU),
    ),
    "gated_delta_rule": (
        Peer(
            "transformers torch_chunk_gated_delta_rule",
            _transformers("qwen3_next", "torch_chunk_gated_delta_rule"),
            decay_before_beta,
            devices=_CPU,
        ),
        Peer(
            "transformers torch_recurrent_gated_delta_rule",
            _transformers("qwen3_next", "torch_recurrent_gated_delta_rule"),
            decay_before_beta,
            devices=_CPU,
        ),
        Peer(
            "fla naive_chunk_gated_delta_rule",
            _fla("gated_delta_rule", "naive_chunk_gated_delta_rule"),
            decay_before_beta,
            devices=_CPU,
        ),
    ),
    "attention": (_composed("torch SDPA", _sdpa, **HEADS_FIRST),),
    "diff_attention": (_composed("two SDPA calls and a subtraction", _sdpa_difference, **HEADS_FIRST),),
    "attention_decode": (
        _composed("torch SDPA", _sdpa_over_cache, arrange=_cache_heads_first, restore=lambda y: y.squeeze(2)),
    ),
    "glu": (_composed("composed", lambda gate, up: F.silu(gate) * up),),
    "rms_norm": (_composed("torch rms_norm", lambda x, w: F.rms_norm(x, w.shape, w.to(x.dtype), 1e-6)),),
    "rope": (_composed("composed", _rotate, constants=(1, 2)),),
    "linear_cross_entropy": (_composed("torch cross_entropy of the logits", _logits_loss),),
}
