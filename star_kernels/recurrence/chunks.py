"""Chunk forms of the recurrences whose state is a matrix: products within a chunk, a state between chunks.

Every decay is the exponential of a sum of log-decays over an interval of tokens. The sums are taken over
the interval itself, never as a difference of two running sums: with log-decays of at most 0 no exponent is
positive, strong decays cancel nothing, and a log-decay of -inf (forget everything) is exact.

All arguments share one wide dtype; q carries the scale; q, k, v, beta and log_decay have the same heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels.contracts import without_autocast

CHUNK = 64
"""Tokens a chunk, a power of two."""
PAIRS = 4
"""Tokens among which decays of key dimensions are made pair by pair, (PAIRS, PAIRS, Dk) at a time."""


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t; q, k (B, L, H, Dk), v (B, L, H, Dv)."""
    if v.shape[1] == 0:
        return v, state
    with without_autocast(v):
        q_, k_, v_, decays = _in_chunks(log_decay, q, k, v)
        within = decays.between(q_, k_) @ v_
        added = decays.until_end(k_).mT @ v_
        before = []
        for whole, update in zip(decays.whole().unbind(2), added.unbind(2), strict=True):
            before.append(state)
            state = torch.addcmul(update, whole, state)
        y = within + decays.from_start(q_) @ torch.stack(before, dim=2)
    return _in_tokens(y, v.shape[1]), state


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t u_tᵀ with u_t = β_t (v_t − (exp(g_t) S_{t-1})ᵀ k_t), y_t = S_tᵀ q_t.

    Written out, the u of a chunk that starts from S solve a unit triangular system (the WY form of
    arXiv 2412.06464): (I + M) U = βV − (β·decayed K) S, with M_ts = β_t exp(g_s+1..t) k_t·k_s for s < t.
    """
    if v.shape[1] == 0:
        return v, state
    with without_autocast(v):
        q_, k_, v_, decays, beta_ = _in_chunks(log_decay, q, k, v, beta)
        beta_ = beta_[..., None]
        system = (beta_ * decays.between(k_, k_)).tril(-1)
        right = torch.cat([beta_ * v_, beta_ * decays.from_start(k_)], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        values, keys = solved.split([v_.shape[-1], k_.shape[-1]], dim=-1)
        keys_to_end = decays.until_end(k_).mT
        before, updates = [], []
        for whole, value, key, key_to_end in zip(
            *(tensor.unbind(2) for tensor in (decays.whole(), values, keys, keys_to_end)), strict=True
        ):
            before.append(state)
            updates.append(value - key @ state)
            state = whole * state + key_to_end @ updates[-1]
        y = decays.between(q_, k_) @ torch.stack(updates, dim=2)
        y = y + decays.from_start(q_) @ torch.stack(before, dim=2)
    return _in_tokens(y, v.shape[1]), state


class _Decays:
    """The decays within chunks, applied to queries (t) and keys (s); log_decay (…, c, Dk) or (…, c, 1)."""

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay

    def between(self, q: Tensor, k: Tensor) -> Tensor:
        """(…, c, c): q_t·(decay over s+1..t of k_s) for s <= t, and 0 above the diagonal."""
        size = q.shape[-2]
        if self.log_decay.shape[-1] == 1:
            return (q @ k.mT) * self._intervals()[..., 0]
        if size <= PAIRS:
            return (q[..., :, None, :] * k[..., None, :, :] * self._intervals()).sum(-1)
        # Two halves: pairs within each, and from the first to the second across their boundary.
        log_decays, queries, keys = (t.unflatten(-2, (2, -1)) for t in (self.log_decay, q, k))
        first, second = _Decays(log_decays[..., 0, :, :]), _Decays(log_decays[..., 1, :, :])
        inside = _Decays(log_decays).between(queries, keys)
        across = second.from_start(queries[..., 1, :, :]) @ first.until_end(keys[..., 0, :, :]).mT
        upper = torch.cat([inside[..., 0, :, :], torch.zeros_like(across)], dim=-1)
        return torch.cat([upper, torch.cat([across, inside[..., 1, :, :]], dim=-1)], dim=-2)

    def _intervals(self) -> Tensor:
        """(…, c, c, Dk or 1): the decay over s+1..t for s <= t, and 0 above the diagonal."""
        token = torch.arange(self.log_decay.shape[-2], device=self.log_decay.device)
        later = (token[:, None] > token)[..., None]  # (r, s, 1): r > s
        spread = torch.where(later, self.log_decay[..., :, None, :], 0.0)
        return spread.cumsum(-3).masked_fill((token[:, None] < token)[..., None], -torch.inf).exp()

    def from_start(self, q: Tensor) -> Tensor:
        """q_t decayed over 1..t: what it sees of the state before the chunk."""
        return q * self.log_decay.cumsum(-2).exp()

    def until_end(self, k: Tensor) -> Tensor:
        """k_s decayed over s+1..c: what is left of it in the state after the chunk."""
        after = F.pad(self.log_decay[..., 1:, :], (0, 0, 0, 1))
        return k * after.flip(-2).cumsum(-2).flip(-2).exp()

    def whole(self) -> Tensor:
        """(B, H, n, Dk or 1, 1): the decay of a state over a whole chunk."""
        return self.log_decay.sum(-2).exp()[..., None]


def _in_chunks(log_decay: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """(B, L, H, …) as (B, H, n, c, …). The last chunk is filled with tokens that change nothing."""
    length = v.shape[1]
    size = CHUNK
    while size >= 2 * length:
        size //= 2
    missing = -length % size

    def cut(tensor: Tensor) -> Tensor:
        if missing:
            tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)
        return tensor.movedim(1, 2).contiguous().unflatten(2, (-1, size))

    decays = _Decays(cut(log_decay if log_decay.dim() == 4 else log_decay[..., None]))
    return cut(q), cut(k), cut(v), decays, *(cut(other) for other in others)


def _in_tokens(y: Tensor, length: int) -> Tensor:
    """(B, H, n, c, Dv) as (B, L, H, Dv)."""
    return y.flatten(2, 3).movedim(1, 2)[:, :length]
