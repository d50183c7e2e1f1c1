"""The attention references against literal loops of their equations in float64, and against PyTorch's own."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import star_kernels as sk
from star_kernels import dispatch

torch.set_num_threads(1)


def tensors(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, value_width: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, count: int, width: int) -> Tensor:
        return torch.randn(2, length, count, width, generator=generator, dtype=torch.float64)

    return draw(queries, heads, 8), draw(keys, kv_heads, 8), draw(keys, kv_heads, value_width)


def weights_by_loops(
    q: Tensor,
    k: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: list[int] | None = None,
) -> Tensor:
    """Softmax weights (B, H, Lq, Lk), one query and one key at a time."""
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    weights = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)

    def sequence(position: int) -> int:
        return sum(position >= offset for offset in cu_seqlens or [])

    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                position = i + keys - queries
                exponentials = {}
                for j in range(keys):
                    seen = not (causal and j > position)
                    seen = seen and (window is None or abs(j - position) < window)
                    if seen and sequence(position) == sequence(j):
                        score = scale * float(q[b, i, h] @ k[b, j, h // group])
                        score = softcap * math.tanh(score / softcap) if softcap else score
                        exponentials[j] = math.exp(score)
                for j, value in exponentials.items():
                    weights[b, h, i, j] = value / sum(exponentials.values())
    return weights


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    group = weights.shape[1] // v.shape[2]
    heads = [weights[:, h] @ v[:, :, h // group] for h in range(weights.shape[1])]
    return torch.stack(heads, dim=2)


SITUATIONS = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 3},
    {"causal": False, "window": 2},
    {"scale": 0.3, "softcap": 0.7},
    {"window": 4, "softcap": 2.0},
]


@pytest.mark.parametrize("arguments", SITUATIONS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 7), (3, 7), (7, 3), (1, 1)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_is_its_equation(backend: str, queries: int, keys: int, arguments: dict) -> None:
    q, k, v = tensors(queries, keys)
    expected = mixed(weights_by_loops(q, k, **arguments), v)
    if backend == "torch":
        actual = sk.attention(q.float(), k.float(), v.float(), backend=backend, **arguments)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(sk.attention(q, k, v, **arguments), expected)


@pytest.mark.parametrize("arguments", [{}, {"causal": False}, {"window": 2}])
def test_packed_sequences_do_not_see_each_other(arguments: dict) -> None:
    q, k, v = (tensor[:1] for tensor in tensors(9, 9))
    offsets = [0, 4, 4, 5, 9]
    packed = sk.attention(q, k, v, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), **arguments)
    torch.testing.assert_close(packed, mixed(weights_by_loops(q, k, cu_seqlens=offsets, **arguments), v))
    for start, end in itertools.pairwise(offsets):
        alone = sk.attention(q[:, start:end], k[:, start:end], v[:, start:end], **arguments)
        torch.testing.assert_close(packed[:, start:end], alone)


@pytest.mark.parametrize("backend", dispatch.available("attention", torch.zeros(1)))
@pytest.mark.parametrize("window", [2**40 - 1, 2**62, sys.maxsize])
def test_windows_beyond_any_sequence_hide_nothing(backend: str, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 70, 2, 16, generator=generator)
    for causal in (True, False):
        whole = sk.attention(q, k, v, causal=causal, backend="reference")
        y = sk.attention(q, k, v, causal=causal, window=window, backend=backend)
        torch.testing.assert_close(y, whole)
    if backend == "cpp":
        y = torch.ops.star_kernels.attention(q, k, v, True, window, 0.25, 0.0, None)
        torch.testing.assert_close(y, sk.attention(q, k, v, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(backend: str, queries: int, keys: int) -> None:
    q, k, v = (tensor.float() for tensor in tensors(queries, keys))
    y = sk.attention(q, k, v, backend=backend)
    assert torch.equal(y, torch.zeros(2, queries, 4, 3))


def test_blind_queries_have_zero_gradients() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(5, 2))
    gradients = torch.autograd.grad(sk.attention(q, k, v).square().sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :3].any()


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"window": 2}, {"causal": False, "scale": 0.3}])
def test_diff_attention_is_its_equation(arguments: dict, scalar: bool) -> None:
    q1, k1, v = tensors(4, 6)
    q2, k2 = q1.flip(-1), 0.5 * k1.flip(-1)
    lam = torch.tensor(0.3 if scalar else [0.1, 0.2, 0.3, 0.8], dtype=torch.float64)
    weights = weights_by_loops(q1, k1, **arguments)
    weights = weights - lam.reshape(-1, 1, 1) * weights_by_loops(q2, k2, **arguments)
    torch.testing.assert_close(sk.diff_attention(q1, k1, q2, k2, v, lam, **arguments), mixed(weights, v))


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_decode_is_the_last_row_of_attention(window: int | None) -> None:
    q, k, v = tensors(1, 7)
    lengths = torch.tensor([7, 4], dtype=torch.int32)
    y = sk.attention_decode(q[:, 0], k, v, lengths, window=window)
    for b, length in enumerate(lengths.tolist()):
        row = slice(b, b + 1)
        expected = sk.attention(q[row], k[row, :length], v[row, :length], window=window)
        torch.testing.assert_close(y[row], expected[:, 0])


def test_attention_decode_over_an_empty_cache_gives_zeros() -> None:
    q, k, v = tensors(1, 7)
    y = sk.attention_decode(q[:, 0], k, v, torch.tensor([0, 2], dtype=torch.int32))
    assert not y[0].any()
    assert y[1].any()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_agrees_with_pytorch(causal: bool) -> None:
    q, k, v = tensors(6, 6)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(sk.attention(q, k, v, causal=causal), expected.transpose(1, 2))


def test_attention_agrees_with_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, v = tensors(6, 6, value_width=8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    expected, _ = llama.eager_attention_forward(module, *heads_first, mask, scaling=8**-0.5)
    torch.testing.assert_close(sk.attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_diff_attention_agrees_with_transformers() -> None:
    diffllama = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    config = diffllama.DiffLlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    layer = diffllama.DiffLlamaAttention(config, layer_idx=1).double()
    layer.groupnorm = layer.o_proj = torch.nn.Identity()
    x = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    unturned = torch.ones(1, 6, 8, dtype=torch.float64), torch.zeros(1, 6, 8, dtype=torch.float64)
    expected, _ = layer(x, unturned, mask)

    # Heads of the first half make one softmax, those of the second the other; values lie side by side.
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (projection(x).unflatten(-1, (-1, 8)).chunk(2, dim=2) for projection in projections)
    first = torch.exp(layer.lambda_q1 @ layer.lambda_k1)
    lam = first - torch.exp(layer.lambda_q2 @ layer.lambda_k2) + layer.lambda_init
    y = sk.diff_attention(q[0], k[0], q[1], k[1], torch.cat(v, dim=-1), lam)
    torch.testing.assert_close((1 - layer.lambda_init) * y.flatten(2), expected, rtol=1e-5, atol=1e-6)


def test_derivatives_are_right() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in tensors(3, 4))
    assert torch.autograd.gradcheck(lambda *t: sk.attention(*t, window=2, softcap=1.5), (q, k, v))
    lam = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: sk.diff_attention(t[0], t[1], t[0], t[1] * 2, *t[2:]), (q, k, v, lam)
    )


@pytest.mark.parametrize("arguments", [{}, {"window": 3}, {"softcap": 2.0}])
def test_autocast_keeps_the_softmax_in_float32(arguments: dict) -> None:
    q, k, v = (tensor.float() for tensor in tensors(6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.attention(q, k, v, backend="reference", **arguments)
    rounded = [tensor.bfloat16() for tensor in (q, k, v)]
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, sk.attention(*rounded, backend="reference", **arguments))


REFUSED = [
    ({"window": 0}, ValueError, "window"),
    ({"window": 2.0}, TypeError, "window"),
    ({"causal": 1}, TypeError, "causal"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"scale": "1"}, TypeError, "scale"),
    ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "cu_seqlens"),
    ({"k": torch.zeros(2, 6, 2, 9)}, ValueError, "k has"),
    ({"q": torch.zeros(2, 6, 3, 8)}, ValueError, "k has Hkv = 2; it takes a divisor of H = 3"),
    ({"v": torch.zeros(2, 5, 2, 8)}, ValueError, "v has"),
    ({"v": torch.zeros(2, 6, 2, 8).half()}, TypeError, "v has"),
    ({"q": None}, TypeError, "q is"),
]


@pytest.mark.parametrize(("wrong", "error", "names"), REFUSED)
def test_attention_refuses(wrong: dict, error: type[Exception], names: str) -> None:
    q, k, v = (tensor.float() for tensor in tensors(6, 6))
    arguments = {"q": q, "k": k, "v": v} | wrong
    with pytest.raises(error, match=f"attention: .*{names}"):
        sk.attention(**arguments)


@pytest.mark.parametrize("length", [-1, 8])
def test_attention_decode_refuses_lengths_outside_the_cache(length: int) -> None:
    q, k, v = tensors(1, 7)
    with pytest.raises(ValueError, match=f"lengths holds {length}; it takes 0 to Lmax = 7"):
        sk.attention_decode(q[:, 0], k, v, torch.tensor([1, length], dtype=torch.int32))
