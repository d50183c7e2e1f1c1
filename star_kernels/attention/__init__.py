"""Softmax attention: full, windowed, grouped-query, differential, and one token over a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import dispatch
from star_kernels.attention import fused, reference
from star_kernels.contracts import Contract, autocast_together, holds_values

for _name in ("attention", "diff_attention", "attention_decode"):
    dispatch.register(_name, "reference", getattr(reference, _name))
for _name in ("attention", "diff_attention"):
    dispatch.register(_name, "torch", getattr(fused, _name), dtypes=dispatch.KERNEL_DTYPES)
if dispatch.load_compiled():
    from star_kernels.attention import compiled as compiled
dispatch.load_triton("attention")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention: y_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the keys j that query i sees.

    Queries are aligned with keys at the end: query i stands at position p = i + Lk - Lq, so that the last
    query sees all keys. A query that sees no key (Lq > Lk under ``causal``) gives zeros.

    Args:
        q: (B, Lq, H, Dh), any strides whose last dimension is contiguous, as for k and v.
        k: (B, Lk, Hkv, Dh); H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        v: (B, Lk, Hkv, Dv).
        causal: key j is seen where j <= p.
        window: only keys nearer than this many positions are seen, j > p - window (and j < p + window
            where not causal); it counts the current token.
        scale: default Dh^-0.5.
        softcap: replaces each score s by softcap · tanh(s / softcap) (Gemma 2, arXiv 2408.00118).
        cu_seqlens: (S+1,) int32 offsets of S sequences packed into a batch of 1; needs Lq = Lk.
        backend: None (the fastest that covers the call), "reference", "torch", "cpp", "cuda" or "triton".

    Returns:
        y (B, Lq, H, Dv) in q's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    q, k, v = autocast_together(q, k, v)
    call = Contract("attention")
    call.tensor("q", q, "B Lq H Dh")
    call.tensor("k", k, "B Lk Hkv Dh")
    call.tensor("v", v, "B Lk Hkv Dv")
    call.multiple("H", "Hkv")
    call.at_least("Dh", 1)
    window = _check_visibility(call, causal, window, scale)
    call.optional_number("softcap", softcap, above=0.0)
    if cu_seqlens is not None:
        call.bind("L", q.shape[1], "q")
        call.sequences(cu_seqlens)
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention: k has length {k.shape[1]}; with cu_seqlens it takes q's, {q.shape[1]}"
            )
    return dispatch.choose("attention", backend, q)(
        q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens
    )


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Differential attention, (softmax(q1·k1) - lam · softmax(q2·k2)) v, in one pass (arXiv 2410.05258).

    Args:
        q1, q2: (B, Lq, H, Dh), the queries of both halves, any strides whose last dimension is contiguous.
        k1, k2: (B, Lk, Hkv, Dh), their keys; H is a multiple of Hkv.
        v: (B, Lk, Hkv, Dv), the common values; Dv is often twice Dh.
        lam: () or (H,), a tensor of any floating dtype.
        causal, window, scale, backend: as in :func:`attention`.

    Returns:
        y (B, Lq, H, Dv) in q1's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above.
    """
    q1, k1, q2, k2, v = autocast_together(q1, k1, q2, k2, v)
    call = Contract("diff_attention")
    call.tensor("q1", q1, "B Lq H Dh")
    call.tensor("k1", k1, "B Lk Hkv Dh")
    call.tensor("q2", q2, "B Lq H Dh")
    call.tensor("k2", k2, "B Lk Hkv Dh")
    call.tensor("v", v, "B Lk Hkv Dv")
    call.multiple("H", "Hkv")
    call.at_least("Dh", 1)
    is_scalar = isinstance(lam, Tensor) and lam.dim() == 0
    call.parameter("lam", lam, "" if is_scalar else "H")
    window = _check_visibility(call, causal, window, scale)
    return dispatch.choose("diff_attention", backend, q1)(
        q1, k1, q2, k2, v, lam, causal=causal, window=window, scale=scale
    )


@dispatch.compiled_step
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token's attention over a cache that already holds its key and value.

    Args:
        q: (B, H, Dh), the queries of the newest tokens.
        k_cache: (B, Lmax, Hkv, Dh), any strides whose last dimension is contiguous; H is a multiple of Hkv.
        v_cache: (B, Lmax, Hkv, Dv).
        lengths: (B,) int32, how many entries of each cache are filled, the newest token included; a
            sequence of length 0 gives zeros. On a GPU the values are not read on the host.
        scale: default Dh^-0.5.
        window: only the last this many entries are seen.
        backend: as in :func:`attention`.

    Returns:
        y (B, H, Dv) in q's dtype.

    Raises:
        ValueError, TypeError: an argument of another shape, dtype or device than named above, or, on a
            CPU, a length outside 0 to Lmax.
    """
    q, k_cache, v_cache = autocast_together(q, k_cache, v_cache)
    arguments = (q, k_cache, v_cache, lengths)
    _check_decode(*arguments, scale, window)
    return dispatch.choose("attention_decode", backend, q)(*arguments, scale=scale, window=window)


def _check_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None, window: int | None
) -> None:
    call = Contract("attention_decode")
    call.tensor("q", q, "B H Dh")
    call.tensor("k_cache", k_cache, "B Lmax Hkv Dh")
    call.tensor("v_cache", v_cache, "B Lmax Hkv Dv")
    call.multiple("H", "Hkv")
    call.at_least("Dh", 1)
    call.integers("lengths", lengths, "B", (torch.int32,))
    if lengths.device.type == "cpu" and holds_values(lengths):
        for length in lengths.tolist():
            if not 0 <= length <= k_cache.shape[1]:
                raise ValueError(
                    f"attention_decode: lengths holds {length}; it takes 0 to Lmax = {k_cache.shape[1]}"
                )
    call.optional_number("scale", scale)
    _check_window(call, window)


_LONGER_THAN_ANY_SEQUENCE = 2**40


def _check_visibility(call: Contract, causal: bool, window: int | None, scale: float | None) -> int | None:
    """The window, None where no sequence is as long: sums of positions and a longer one could overflow."""
    call.flag("causal", causal)
    _check_window(call, window)
    call.optional_number("scale", scale)
    return None if window is None or window >= _LONGER_THAN_ANY_SEQUENCE else window


def _check_window(call: Contract, window: int | None) -> None:
    if window is not None:
        call.count("window", window)
