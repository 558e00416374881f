"""Group norm with SiLU, GEGLU, and attention among few tokens, as Triton kernels. The only import of triton;
fused_triton.py and attention_triton.py start them.

A program of the group norm takes a stretch of one unit's positions and COLUMNS channels, whatever the groups:
it reads whole cache lines, tile by tile, and what it sums is each channel's. A small kernel then joins
stretches to units and channels to groups. So there are programs enough even for one long clip, and nothing is
added in an order that could change (no atomics). Statistics are centred (Welford within a program, Chan's
formula to join). All arithmetic is float32, and results are rounded once.

Shapes: N units (frames or clips), S positions, C channels, G groups; P stretches, of all units, each of up to
`length` positions; R rows, H channels of half a projection; T tokens. Offsets are 64-bit up to a program's
first row, 32-bit from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Else each number of positions that 16 divides, and each place of a parameter in ZeRO-3's flat buffer, would
# have a kernel compiled for it.
_kernel = triton.jit(
    do_not_specialize=("S", "groups", "length", "R", "T", "units"),
    do_not_specialize_on_alignment=("weight", "bias"),
)


@triton.jit
def _place(S, C, length, COLUMNS: tl.constexpr):
    """This program's stretch, its unit, first row and number of rows; its channels."""
    tiles = tl.cdiv(C, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    stretch = (tl.program_id(0) // tiles).to(tl.int64)
    stretches = tl.cdiv(S, length)
    unit, start = stretch // stretches, stretch % stretches * length
    return stretch, unit, unit * S + start, tl.minimum(length, S - start).to(tl.int32), columns


@triton.jit
def _tile(first, count, columns, C, ROWS: tl.constexpr):
    """Offsets of ROWS rows from `first` on, and which of their elements there are."""
    rows = first + tl.arange(0, ROWS)[:, None]
    return rows * C + columns, (rows < count) & (columns < C)


@triton.jit
def _of_groups(values_NG, unit, columns, C, groups):
    """For each channel its group's value."""
    return tl.load(values_NG + unit * groups + columns // (C // groups), columns < C, 0.0)


@triton.jit
def _of_channels(values_C, columns, C):
    return tl.load(values_C + columns, columns < C, 0.0).to(tl.float32)


@_kernel
def statistics(x, mean_PC, squares_PC, S, C, groups, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each channel in a stretch: mean, and sum of squared differences from it."""
    stretch, _, first_row, count, columns = _place(S, C, length, COLUMNS)
    x += first_row * C
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        offsets, here = _tile(first, count, columns, C, ROWS)
        value = tl.load(x + offsets, here, 0.0).to(tl.float32)
        delta = tl.where(here, value - mean, 0.0)
        mean += delta * (1.0 / (first // ROWS + 1))
        squares += delta * (value - mean)
    # Each row of the tile has seen every ROWS-th position.
    seen = tl.cdiv(tl.maximum(count - tl.arange(0, ROWS)[:, None], 0), ROWS).to(tl.float32)
    whole_mean = tl.sum(seen * mean, axis=0, keep_dims=True) / count
    delta = mean - whole_mean
    whole_squares = tl.sum(squares + seen * delta * delta, axis=0, keep_dims=True)
    tl.store(mean_PC + stretch * C + columns, whole_mean, columns < C)
    tl.store(squares_PC + stretch * C + columns, whole_squares, columns < C)


@triton.jit
def _place_of_group(S, C, groups, length, WIDTH: tl.constexpr):
    """This program's unit, its number of stretches, and its group's channels."""
    channels = tl.arange(0, WIDTH)[None, :]
    first, stretches = tl.program_id(0) % groups * (C // groups), tl.cdiv(S, length)
    unit = (tl.program_id(0) // groups).to(tl.int64)
    return unit, stretches, first + channels, channels < C // groups


@_kernel
def join_statistics(
    mean_PC, squares_PC, mean_NG, rstd_NG, S, C, groups, length, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Mean and 1 / standard deviation of a group."""
    unit, stretches, columns, inside = _place_of_group(S, C, groups, length, WIDTH)
    mean_PC += unit * stretches * C
    squares_PC += unit * stretches * C
    parts = tl.arange(0, PARTS)[:, None]
    size = 1.0 * S * (C // groups)
    sums = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, stretches, PARTS):
        offsets, here = _tile(first, stretches, columns, C, PARTS)
        count = tl.minimum(S - (first + parts) * length, length)
        sums += count * tl.load(mean_PC + offsets, here & inside, 0.0)
    mean = tl.sum(sums) / size
    sums = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, stretches, PARTS):
        offsets, here = _tile(first, stretches, columns, C, PARTS)
        count = tl.minimum(S - (first + parts) * length, length)
        delta = tl.load(mean_PC + offsets, here & inside, mean) - mean
        sums += tl.load(squares_PC + offsets, here & inside, 0.0) + count * delta * delta
    tl.store(mean_NG + tl.program_id(0), mean)
    tl.store(rstd_NG + tl.program_id(0), tl.rsqrt(tl.sum(sums) / size + eps))


@_kernel
def normalise(
    x, weight, bias, mean_NG, rstd_NG, y, S, C, groups, length,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z = weight n + bias with n = (x - mean) rstd, or its SiLU."""
    _, unit, first_row, count, columns = _place(S, C, length, COLUMNS)
    x += first_row * C
    y += first_row * C
    mean = _of_groups(mean_NG, unit, columns, C, groups)
    scale = _of_groups(rstd_NG, unit, columns, C, groups) * _of_channels(weight, columns, C)
    shift = _of_channels(bias, columns, C)
    for first in range(0, count, ROWS):
        offsets, here = _tile(first, count, columns, C, ROWS)
        z = (tl.load(x + offsets, here, 0.0).to(tl.float32) - mean) * scale + shift
        tl.store(y + offsets, z * tl.sigmoid(z) if SILU else z, here)


@triton.jit
def _gradient(x, dy, offsets, here, mean, rstd, scale, shift, SILU: tl.constexpr):
    """n, and the gradient of z."""
    n = (tl.load(x + offsets, here, 0.0).to(tl.float32) - mean) * rstd
    dz = tl.load(dy + offsets, here, 0.0).to(tl.float32)
    if SILU:
        z = n * scale + shift
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid * (1 + z * (1 - sigmoid))
    return n, dz


@_kernel
def gradient_sums(
    x, dy, weight, bias, mean_NG, rstd_NG, dz_PC, dz_n_PC, S, C, groups, length,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a stretch, channel by channel, of dz and of dz n."""
    stretch, unit, first_row, count, columns = _place(S, C, length, COLUMNS)
    x += first_row * C
    dy += first_row * C
    mean, rstd = _of_groups(mean_NG, unit, columns, C, groups), _of_groups(rstd_NG, unit, columns, C, groups)
    scale, shift = _of_channels(weight, columns, C), _of_channels(bias, columns, C)
    sum_dz = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_dz_n = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        offsets, here = _tile(first, count, columns, C, ROWS)
        n, dz = _gradient(x, dy, offsets, here, mean, rstd, scale, shift, SILU)
        sum_dz += dz
        sum_dz_n += dz * n
    tl.store(dz_PC + stretch * C + columns, tl.sum(sum_dz, axis=0, keep_dims=True), columns < C)
    tl.store(dz_n_PC + stretch * C + columns, tl.sum(sum_dz_n, axis=0, keep_dims=True), columns < C)


@_kernel
def join_gradient_sums(
    dz_PC, dz_n_PC, weight, dz_NC, dz_n_NC, dz_NG, dz_n_NG, S, C, groups, length,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums over a unit, channel by channel, and the group's averages of weight dz and of weight dz n."""
    unit, stretches, columns, inside = _place_of_group(S, C, groups, length, WIDTH)
    dz_PC += unit * stretches * C
    dz_n_PC += unit * stretches * C
    sum_dz = tl.zeros((PARTS, WIDTH), tl.float32)
    sum_dz_n = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, stretches, PARTS):
        offsets, here = _tile(first, stretches, columns, C, PARTS)
        sum_dz += tl.load(dz_PC + offsets, here & inside, 0.0)
        sum_dz_n += tl.load(dz_n_PC + offsets, here & inside, 0.0)
    dz, dz_n = tl.sum(sum_dz, axis=0, keep_dims=True), tl.sum(sum_dz_n, axis=0, keep_dims=True)
    tl.store(dz_NC + unit * C + columns, dz, inside)
    tl.store(dz_n_NC + unit * C + columns, dz_n, inside)
    share = tl.load(weight + columns, inside, 0.0).to(tl.float32) / (1.0 * S * (C // groups))
    tl.store(dz_NG + tl.program_id(0), tl.sum(share * dz))
    tl.store(dz_n_NG + tl.program_id(0), tl.sum(share * dz_n))


@_kernel
def through_norm(
    x, dy, weight, bias, mean_NG, rstd_NG, dz_NG, dz_n_NG, dx, S, C, groups, length,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (weight dz - <weight dz> - n <weight dz n>), <.> the average over a group."""
    _, unit, first_row, count, columns = _place(S, C, length, COLUMNS)
    x += first_row * C
    dy += first_row * C
    dx += first_row * C
    mean, rstd = _of_groups(mean_NG, unit, columns, C, groups), _of_groups(rstd_NG, unit, columns, C, groups)
    scale, shift = _of_channels(weight, columns, C), _of_channels(bias, columns, C)
    one, per_n = _of_groups(dz_NG, unit, columns, C, groups), _of_groups(dz_n_NG, unit, columns, C, groups)
    for first in range(0, count, ROWS):
        offsets, here = _tile(first, count, columns, C, ROWS)
        n, dz = _gradient(x, dy, offsets, here, mean, rstd, scale, shift, SILU)
        tl.store(dx + offsets, rstd * (scale * dz - one - n * per_n), here)


@_kernel
def gate_halves(proj, dy, out, R, H, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """hidden gelu(gate) for proj = [hidden, gate], or the gradient of proj."""
    tiles = tl.cdiv(H, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    here = (first + rows < R) & (columns < H)
    proj += first * (2 * H)
    hidden = tl.load(proj + rows * (2 * H) + columns, here, 0.0).to(tl.float32)
    gate = tl.load(proj + rows * (2 * H) + H + columns, here, 0.0).to(tl.float32)
    # The standard normal distribution's share below the gate.
    share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    if BACKWARD:
        grad = tl.load(dy + first * H + rows * H + columns, here, 0.0).to(tl.float32)
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        out += first * (2 * H)
        tl.store(out + rows * (2 * H) + columns, grad * gate * share, here)
        tl.store(out + rows * (2 * H) + H + columns, grad * hidden * slope, here)
    else:
        tl.store(out + first * H + rows * H + columns, hidden * gate * share, here)


@triton.jit
def _tokens_of(
    clip_stride, unit_stride, token_stride, head_stride, units, heads, T,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Where this program's clip, unit and head begin; offsets of its tokens, and which of them there are."""
    unit = (tl.program_id(0) // heads).to(tl.int64)
    start = unit // units * clip_stride + unit % units * unit_stride + tl.program_id(0) % heads * head_stride
    tokens = tl.arange(0, TOKENS)[:, None]
    return start, tokens * token_stride + tl.arange(0, WIDTH)[None, :], tokens < T


@triton.jit
def _attention_weights(queries, keys, scale, T, TOKENS: tl.constexpr):
    """softmax(q k^T scale) among the tokens that there are."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, TOKENS)[None, :] < T, scores, float("-inf"))
    raised = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
    return raised / tl.sum(raised, axis=1, keep_dims=True)


@_kernel
def attend(
    q, k, v, out, clip_stride, unit_stride, token_stride, head_stride, out_clip_stride, out_unit_stride,
    out_token_stride, out_head_stride, units, heads, T, scale, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program has all tokens of one unit and head."""
    start, offsets, here = _tokens_of(
        clip_stride, unit_stride, token_stride, head_stride, units, heads, T, TOKENS, WIDTH
    )
    queries, keys = tl.load(q + start + offsets, here, 0.0), tl.load(k + start + offsets, here, 0.0)
    values = tl.load(v + start + offsets, here, 0.0)
    weights = _attention_weights(queries, keys, scale, T, TOKENS).to(values.dtype)
    start, offsets, here = _tokens_of(
        out_clip_stride, out_unit_stride, out_token_stride, out_head_stride, units, heads, T, TOKENS, WIDTH
    )
    tl.store(out + start + offsets, tl.dot(weights, values, input_precision="ieee"), here)


@_kernel
def attend_backward(
    q, k, v, dout, dq, dk, dv, clip_stride, unit_stride, token_stride, head_stride, out_clip_stride,
    out_unit_stride, out_token_stride, out_head_stride, units, heads, T, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients in the layout of `dout`: the weights are computed again."""
    start, offsets, here = _tokens_of(
        clip_stride, unit_stride, token_stride, head_stride, units, heads, T, TOKENS, WIDTH
    )
    queries, keys = tl.load(q + start + offsets, here, 0.0), tl.load(k + start + offsets, here, 0.0)
    values = tl.load(v + start + offsets, here, 0.0)
    start, offsets, here = _tokens_of(
        out_clip_stride, out_unit_stride, out_token_stride, out_head_stride, units, heads, T, TOKENS, WIDTH
    )
    grad = tl.load(dout + start + offsets, here, 0.0)
    weights = _attention_weights(queries, keys, scale, T, TOKENS)
    dvalues = tl.dot(tl.trans(weights.to(values.dtype)), grad, input_precision="ieee")
    dweights = tl.dot(grad, tl.trans(values), input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1, keep_dims=True)) * scale
    dscores = dscores.to(values.dtype)
    tl.store(dv + start + offsets, dvalues, here)
    tl.store(dq + start + offsets, tl.dot(dscores, keys, input_precision="ieee"), here)
    tl.store(dk + start + offsets, tl.dot(tl.trans(dscores), queries, input_precision="ieee"), here)


INTERPRETED = not isinstance(gate_halves, triton.JITFunction)
"""With TRITON_INTERPRET=1 at the time of import the kernels run as Python, on any processor."""
