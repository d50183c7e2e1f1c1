"""The long convolutions in Triton: products with blocks of Toeplitz matrices on the tensor cores, no FFT.

A channel's sequence of L tokens is cut into n blocks of P tokens. With X_J the J-th block and T_m the P x P
Toeplitz matrix of lags around m P, T_m[r, c] = kernel_{mP + r − c}, the convolution is one over blocks:

    Y_I = Σ_{m <= I} T_m X_{I−m}

T_m is the same for all blocks and all sequences of the batch, so that the pairs (block, sequence) are the
rows of one matrix product whose inner dimension runs over (m, c), L² products a channel and sequence as in
the triangle of the whole Toeplitz matrix. Rows are ordered block first: a shift by m blocks moves a tile of
rows by m B, and tiles need only the shifts that reach them.

Steps, each one launch:

1. ``_arrange`` multiplies the input gate in and writes (B, L, D) as (D, n, B, P): a channel's rows together.
2. ``_phases`` writes each channel's kernel eight times, copy p delayed by p entries. Row c of T_mᵀ is the
   kernel delayed by c; from copy c mod 8 it is a run that starts at a multiple of 8 entries, 16 bytes, so
   Toeplitz tiles come by wide asynchronous copies as any operand would, though none is ever stored. The skip
   weight is added to the kernel's entry 0, which is all that it does.
3. ``_multiply``: the product above.
4. ``_finish`` goes back to (B, L, D) and multiplies the output gate in.

Backward, with g = dy ⊙ c and u = b ⊙ x: ∂u is the product with the transposed matrices, the same kernel with
rows shifted the other way and the reversed kernel in its copies. ∂kernel_j = Σ_t g_t u_{t−j} comes from the
blocks' outer products, ``_correlate``: Q_m[r, c] = Σ g_{(I, r)} u_{(I−m, c)}, whose diagonals are summed in
registers after a skew. ∂c needs the convolution again: it is not stored.

Operands are rounded to x's dtype, sums are float32, and nothing is summed by atomics. Beyond LONGEST tokens,
where L² no longer pays, the calls go to the reference's composition of FFTs (torch.fft), which PyTorch
differentiates; so do batches of 2^31 tokens or more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.compiled import like
from star_kernels.convolution import reference
from star_kernels.launch import INTERPRETED, Configuration, Kernel, Operator, cdiv, operand_type, rows

LONGEST = 8192
"""The longest sequences that are convolved without FFT."""

LEAST_ROWS = 16 if INTERPRETED else 128
"""Rows a channel should have: a tile of them; few in the interpreter, so that small cases have several."""

PHASES = tl.constexpr(8)
"""Copies of the kernel: as many as there are 2-byte entries in 16 bytes."""


@triton.jit
def _arrange(
    x, gate, result,
    length, width, batch, blocks,
    x_batch, x_stride, gate_batch, gate_stride,
    GATED: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """(B, L, D), times the gate, as (D, n, B, P); zeros behind the last token."""
    chunks = tl.cdiv(blocks * BLOCK, TOKENS)
    sequence = tl.program_id(0) // chunks
    token = (tl.program_id(0) % chunks) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (token < length)[:, None] & (channel < width)[None, :]
    far = token.to(tl.int64)[:, None]
    x += sequence.to(tl.int64) * x_batch
    value = tl.load(x + far * x_stride + channel[None, :], inside, other=0.0)
    if GATED:
        gate += sequence.to(tl.int64) * gate_batch
        factor = tl.load(gate + far * gate_stride + channel[None, :], inside, other=0.0)
        value = value.to(tl.float32) * factor.to(tl.float32)
    place = ((token // BLOCK) * batch + sequence) * BLOCK + token % BLOCK
    value = tl.trans(value.to(result.dtype.element_ty))
    result += channel.to(tl.int64)[:, None] * (blocks * batch * BLOCK) + place[None, :]
    tl.store(result, value, (channel < width)[:, None] & (token < blocks * BLOCK)[None, :])


@triton.jit
def _finish(
    arranged, first_gate, second_gate, first, second,
    length, width, batch, blocks,
    first_batch, first_stride, second_batch, second_stride,
    GATES: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Back to (B, L, D): as it is, times one gate, or times each of two gates."""
    chunks = tl.cdiv(length, TOKENS)
    sequence = tl.program_id(0) // chunks
    token = (tl.program_id(0) % chunks) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = ((token // BLOCK) * batch + sequence) * BLOCK + token % BLOCK
    arranged += channel.to(tl.int64)[:, None] * (blocks * batch * BLOCK) + place[None, :]
    value = tl.load(arranged, (channel < width)[:, None] & (token < length)[None, :], other=0.0)
    value = tl.trans(value).to(tl.float32)
    inside = (token < length)[:, None] & (channel < width)[None, :]
    far = token.to(tl.int64)[:, None]
    target = (sequence.to(tl.int64) * length + far) * width + channel[None, :]
    if GATES == 0:
        tl.store(first + target, value, inside)
    else:
        first_gate += sequence.to(tl.int64) * first_batch
        gate = tl.load(first_gate + far * first_stride + channel[None, :], inside, other=0.0)
        tl.store(first + target, value * gate.to(tl.float32), inside)
    if GATES == 2:
        second_gate += sequence.to(tl.int64) * second_batch
        gate = tl.load(second_gate + far * second_stride + channel[None, :], inside, other=0.0)
        tl.store(second + target, value * gate.to(tl.float32), inside)


@triton.jit
def _phases(
    kernel, skip, result,
    taps, stride, size, front,
    HAS_SKIP: tl.constexpr, REVERSED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy p of a channel's kernel: entry i is kernel_{i − front − p}, or kernel_{front + p − i} reversed."""
    channel = tl.program_id(0).to(tl.int64)
    phase = tl.arange(0, PHASES)[:, None]
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    lag = place - front - phase
    if REVERSED:
        lag = front + phase - place
    known = (lag >= 0) & (lag < taps) & (place < size)
    value = tl.load(kernel + channel * stride + lag, known, other=0.0).to(tl.float32)
    if HAS_SKIP:
        value += tl.where(lag == 0, tl.load(skip + channel).to(tl.float32), 0.0)
    tl.store(result + (channel * PHASES + phase) * size + place, value, place < size)


@triton.jit
def _multiply(
    source, phases, result,
    row_count, batch, blocks, size, front,
    OPERAND: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """ROWS rows (block, sequence) of one channel's result: all shifts that reach them."""
    tiles = tl.cdiv(row_count, ROWS)
    channel = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if not TRANSPOSED:
        tile = tiles - 1 - tile  # those with most shifts start first
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    inner = tl.arange(0, STEP)
    lane = tl.arange(0, BLOCK)[None, :]
    source += channel * row_count * BLOCK + row * BLOCK + inner[None, :]
    late = (inner // PHASES * PHASES)[:, None]
    phases += channel * PHASES * size + (inner % PHASES)[:, None] * size + (front - late) + lane
    if TRANSPOSED:
        shifts = blocks - tile * ROWS // batch
    else:
        shifts = tl.minimum((tile * ROWS + ROWS - 1) // batch + 1, blocks)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for position in range(0, shifts * BLOCK, STEP):
        shift = position // BLOCK
        within = position - shift * BLOCK
        if TRANSPOSED:
            moved = shift * batch
            lag = -shift * BLOCK - within
        else:
            moved = -shift * batch
            lag = shift * BLOCK - within
        inside = (row + moved >= 0) & (row + moved < row_count)
        values = tl.load(source + (moved * BLOCK + within), inside, other=0.0)
        toeplitz = tl.load(phases + tl.multiple_of(lag, 16))
        total = tl.dot(values.to(OPERAND), toeplitz.to(OPERAND), total, input_precision="ieee")
    result += channel * row_count * BLOCK + row * BLOCK + lane
    tl.store(result, total, row < row_count)


@triton.jit
def _correlate(
    gradient, source, ahead, behind,
    batch, blocks,
    OPERAND: tl.constexpr, BLOCK: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums g_t u_{t−j} over tokens and sequences for the lags around m SIDE of one channel.

    Blocks here have SIDE tokens, a divisor of P. The lags m SIDE + r − c from m SIDE on go to ``ahead``,
    those before to ``behind``, each at the place of its lag.
    """
    parts: tl.constexpr = BLOCK // SIDE
    count = blocks * parts
    channel = (tl.program_id(0) // count).to(tl.int64)
    shift = tl.program_id(0) % count
    gradient += channel * blocks * batch * BLOCK
    source += channel * blocks * batch * BLOCK
    lane = tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(shift * batch, count * batch, STEP):
        row = start + tl.arange(0, STEP)
        late = row // batch
        sequence = row - late * batch
        early = late - shift
        inside = (row < count * batch)[:, None]
        to = ((late // parts) * batch + sequence) * BLOCK + (late % parts) * SIDE
        of = ((early // parts) * batch + sequence) * BLOCK + (early % parts) * SIDE
        g = tl.load(gradient + to[:, None] + lane, inside, other=0.0)
        u = tl.load(source + of[:, None] + lane, inside, other=0.0)
        total = tl.dot(tl.trans(g.to(OPERAND)), u.to(OPERAND), total, input_precision="ieee")
    # The skew: column e of row r becomes what lay at c = r − e, so that a diagonal is a column.
    line = tl.arange(0, SIDE)[:, None]
    skewed = tl.gather(total, (line - lane) & (SIDE - 1), axis=1)
    after = tl.sum(tl.where(line >= lane, skewed, 0.0), 0)
    before = tl.sum(tl.where(line < lane, skewed, 0.0), 0)
    place = shift * SIDE + tl.arange(0, SIDE)
    base = channel * blocks * BLOCK
    tl.store(ahead + base + place, after)
    tl.store(behind + base + place - SIDE, before, place >= SIDE)


def _block(arguments: dict[str, Any]) -> str:
    return f"block={arguments['BLOCK']}"


def _blocks(arguments: dict[str, Any]) -> str:
    """The fewer blocks, the more of a tall tile of rows lies above the triangle: the best height depends."""
    return f"block={arguments['BLOCK']},blocks={_power_of_two(arguments['blocks'])}"


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32


def _choose_multiply(arguments: dict[str, Any]) -> Configuration:
    tile = min(LEAST_ROWS, max(16, _power_of_two(arguments["row_count"])))
    if _is_wide(arguments["source"]):
        return Configuration({"ROWS": min(tile, 64), "STEP": 16}, num_warps=8, num_stages=2)
    step = min(32, arguments["BLOCK"])
    return Configuration({"ROWS": tile, "STEP": step}, num_warps=8 if tile == 128 else 4, num_stages=3)


def _choose_correlate(arguments: dict[str, Any]) -> Configuration:
    step = 16 if _is_wide(arguments["source"]) else 64
    side = min(16 if INTERPRETED else 64, arguments["BLOCK"])
    return Configuration({"SIDE": side, "STEP": step}, num_warps=4, num_stages=2)


_TILES = (
    Configuration({"TOKENS": 64, "CHANNELS": 64}, num_warps=4, num_stages=1),
    Configuration({"TOKENS": 32, "CHANNELS": 64}, num_warps=4, num_stages=1),
    Configuration({"TOKENS": 64, "CHANNELS": 32}, num_warps=4, num_stages=1),
    Configuration({"TOKENS": 128, "CHANNELS": 64}, num_warps=8, num_stages=1),
)
ARRANGE = Kernel("long_conv_arrange", _arrange, _TILES)
FINISH = Kernel("long_conv_finish", _finish, _TILES)
PHASES_KERNEL = Kernel(
    "long_conv_phases", _phases, (Configuration({"WIDTH": 512}, num_warps=4, num_stages=1),)
)
MULTIPLY = Kernel(
    "long_conv_multiply",
    _multiply,
    (
        Configuration({"ROWS": 128, "STEP": 32}, num_warps=8, num_stages=3),
        Configuration({"ROWS": 128, "STEP": 64}, num_warps=8, num_stages=3),
        Configuration({"ROWS": 128, "STEP": 64}, num_warps=4, num_stages=3),
        Configuration({"ROWS": 64, "STEP": 64}, num_warps=4, num_stages=3),
        Configuration({"ROWS": 64, "STEP": 64}, num_warps=4, num_stages=4),
        Configuration({"ROWS": 256, "STEP": 64}, num_warps=8, num_stages=3),
    ),
    shape=_blocks,
    choose=_choose_multiply,
)
CORRELATE = Kernel(
    "long_conv_correlate",
    _correlate,
    (
        Configuration({"SIDE": 64, "STEP": 64}, num_warps=4, num_stages=2),
        Configuration({"SIDE": 64, "STEP": 64}, num_warps=4, num_stages=4),
        Configuration({"SIDE": 64, "STEP": 128}, num_warps=4, num_stages=3),
        Configuration({"SIDE": 128, "STEP": 64}, num_warps=8, num_stages=3),
        Configuration({"SIDE": 128, "STEP": 128}, num_warps=8, num_stages=2),
    ),
    shape=_block,
    choose=_choose_correlate,
)


class _Layout:
    """How (B, L, D) is cut: n blocks of P tokens, P such that a channel has rows enough for a tile."""

    def __init__(self, x: Tensor) -> None:
        self.batch, self.length, self.width = x.shape
        self.block = 128
        while self.block > 16 and self.batch * self.length < LEAST_ROWS * self.block:
            self.block //= 2
        self.blocks = cdiv(self.length, self.block)
        self.row_count = self.blocks * self.batch
        self.dtype, self.device = x.dtype, x.device
        # As operand_type: the interpreter cuts digits off where a GPU rounds, so there nothing is in between.
        self.operand = torch.float32 if INTERPRETED else x.dtype

    def arranged(self) -> Tensor:
        shape = (self.width, self.blocks, self.batch, self.block)
        return torch.empty(shape, dtype=self.operand, device=self.device)

    def plain(self) -> Tensor:
        return torch.empty((self.batch, self.length, self.width), dtype=self.dtype, device=self.device)

    def arguments(self) -> dict[str, int]:
        return {
            "length": self.length, "width": self.width, "batch": self.batch, "blocks": self.blocks,
            "BLOCK": self.block,
        }  # fmt: skip

    def arrange(self, x: Tensor, gate: Tensor | None) -> Tensor:
        result, x = self.arranged(), rows(x)
        gate = None if gate is None else rows(gate)
        ARRANGE.launch(
            lambda blocks: (
                self.batch * cdiv(self.blocks * self.block, blocks["TOKENS"]),
                cdiv(self.width, blocks["CHANNELS"]),
            ),
            x=x, gate=gate, result=result, x_batch=x.stride(0), x_stride=x.stride(1),
            gate_batch=0 if gate is None else gate.stride(0),
            gate_stride=0 if gate is None else gate.stride(1), GATED=gate is not None, **self.arguments(),
        )  # fmt: skip
        return result

    def finish(self, arranged: Tensor, *gates: Tensor) -> tuple[Tensor, ...]:
        """The tensor once for each gate, multiplied by it; once as it is without gates."""
        results = tuple(self.plain() for _ in gates or (None,))
        first, second = (*(rows(gate) for gate in gates), None, None)[:2]
        FINISH.launch(
            lambda blocks: (
                self.batch * cdiv(self.length, blocks["TOKENS"]),
                cdiv(self.width, blocks["CHANNELS"]),
            ),
            arranged=arranged, first_gate=first, second_gate=second, first=results[0], second=results[-1],
            first_batch=0 if first is None else first.stride(0),
            first_stride=0 if first is None else first.stride(1),
            second_batch=0 if second is None else second.stride(0),
            second_stride=0 if second is None else second.stride(1),
            GATES=len(gates), **self.arguments(),
        )  # fmt: skip
        return results

    def multiply(
        self, source: Tensor, kernel: Tensor, skip: Tensor | None, *, transposed: bool = False
    ) -> Tensor:
        """An arranged tensor times every channel's Toeplitz matrix, or its transpose."""
        result, kernel = self.arranged(), rows(kernel)
        size = (self.blocks + 1) * self.block
        front = self.blocks * self.block if transposed else self.block
        phases = torch.empty((self.width, PHASES.value, size), dtype=self.operand, device=self.device)
        PHASES_KERNEL.launch(
            lambda blocks: (self.width, cdiv(size, blocks["WIDTH"])),
            kernel=kernel, skip=None if skip is None else skip.contiguous(), result=phases,
            taps=min(kernel.shape[1], self.length), stride=kernel.stride(0), size=size, front=front,
            HAS_SKIP=skip is not None, REVERSED=transposed,
        )  # fmt: skip
        MULTIPLY.launch(
            lambda blocks: (self.width * cdiv(self.row_count, blocks["ROWS"]),),
            source=source, phases=phases, result=result, row_count=self.row_count, batch=self.batch,
            blocks=self.blocks, size=size, front=front, OPERAND=operand_type(self.dtype),
            TRANSPOSED=transposed, BLOCK=self.block,
        )  # fmt: skip
        return result

    def correlate(self, gradient: Tensor, source: Tensor, taps: int) -> tuple[Tensor, Tensor]:
        """Float32 gradients of the kernel (D, taps) and of the skip weight (D,)."""
        lags = self.blocks * self.block
        ahead, behind = torch.zeros((2, self.width, lags), dtype=torch.float32, device=self.device).unbind()
        CORRELATE.launch(
            lambda blocks: (self.width * (lags // blocks["SIDE"]) if self.batch else 0,),
            gradient=gradient, source=source, ahead=ahead, behind=behind, batch=self.batch,
            blocks=self.blocks, OPERAND=operand_type(self.dtype), BLOCK=self.block,
        )  # fmt: skip
        dkernel = torch.zeros((self.width, taps), dtype=torch.float32, device=self.device)
        known = min(taps, lags)
        torch.add(ahead[:, :known], behind[:, :known], out=dkernel[:, :known])
        dskip = ahead[:, :1].sum(1) + behind[:, :1].sum(1)
        return dkernel, dskip


def _long_conv(x: Tensor, kernel: Tensor, skip: Tensor | None) -> Tensor:
    layout = _Layout(x)
    return layout.finish(layout.multiply(layout.arrange(x, None), kernel, skip))[0]


def _long_conv_backward(
    dy: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _Layout(x)
    g = layout.arrange(dy, None)
    dkernel, dskip = layout.correlate(g, layout.arrange(x, None), kernel.shape[1])
    (dx,) = layout.finish(layout.multiply(g, kernel, skip, transposed=True))
    return dx, dkernel, dskip


def _gated_long_conv(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None) -> Tensor:
    layout = _Layout(x)
    return layout.finish(layout.multiply(layout.arrange(x, b), kernel, skip), c)[0]


def _gated_long_conv_backward(
    dy: Tensor, b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of b, c, x, kernel and skip."""
    layout = _Layout(x)
    u, g = layout.arrange(x, b), layout.arrange(dy, c)
    dkernel, dskip = layout.correlate(g, u, kernel.shape[1])
    (dc,) = layout.finish(layout.multiply(u, kernel, skip), dy)
    db, dx = layout.finish(layout.multiply(g, kernel, skip, transposed=True), x, b)
    return db, dc, dx, dkernel, dskip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _long_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, kernel, skip = ctx.saved_tensors
    dx, dkernel, dskip = LONG_BACKWARD(dy, x, kernel, skip)
    return dx, like(dkernel, kernel), like(dskip, skip)


def _gated_autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    b, c, x, kernel, skip = ctx.saved_tensors
    db, dc, dx, dkernel, dskip = GATED_BACKWARD(dy, b, c, x, kernel, skip)
    return db, dc, dx, like(dkernel, kernel), like(dskip, skip)


LONG_BACKWARD = Operator(
    "long_conv_backward",
    "(Tensor dy, Tensor x, Tensor kernel, Tensor? skip) -> (Tensor, Tensor, Tensor)",
    _long_conv_backward,
    public_name="long_conv",
)
LONG = Operator("long_conv", "(Tensor x, Tensor kernel, Tensor? skip) -> Tensor", _long_conv)
LONG.differentiate(_long_autograd, _setup, partner=LONG_BACKWARD)
GATED_BACKWARD = Operator(
    "gated_long_conv_backward",
    "(Tensor dy, Tensor b, Tensor c, Tensor x, Tensor kernel, Tensor? skip) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_long_conv_backward,
    public_name="gated_long_conv",
)
GATED = Operator(
    "gated_long_conv",
    "(Tensor b, Tensor c, Tensor x, Tensor kernel, Tensor? skip) -> Tensor",
    _gated_long_conv,
)
GATED.differentiate(_gated_autograd, _setup, partner=GATED_BACKWARD)


def _is_for_ffts(x: Tensor) -> bool:
    return x.shape[1] > LONGEST or x.shape[0] * x.shape[1] >= 2**31 - 128 * x.shape[0]


def long_conv(x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.long_conv`. Beyond 8192 tokens: the reference, by torch.fft."""
    y: Tensor
    if _is_for_ffts(x):
        return reference.long_conv(x, kernel, skip)
    y = LONG(x, kernel, skip)
    return y


def gated_long_conv(b: Tensor, c: Tensor, x: Tensor, kernel: Tensor, skip: Tensor | None = None) -> Tensor:
    """See :func:`star_kernels.gated_long_conv`. Beyond 8192 tokens: the reference, by torch.fft."""
    y: Tensor
    if _is_for_ffts(x):
        return reference.gated_long_conv(b, c, x, kernel, skip)
    y = GATED(b, c, x, kernel, skip)
    return y


LONG.register(long_conv)
GATED.register(gated_long_conv)
