"""Triton kernels: group norm with SiLU, GEGLU, and attention among few tokens. No other import of triton.

A program of the group norm takes a segment of one unit's positions and COLUMNS channels, independently of the
groups: it reads full cache lines, tile by tile, and sums by channel. A small kernel then combines segments to
units and channels to groups: enough programs for one long clip, and a fixed order of additions (no atomics).
Statistics are centred (Welford, then Chan's formula). Arithmetic is float32, and results are rounded once.

Shapes: N units (frames or clips), S positions, C channels, G groups; P segments of up to `length` positions;
R rows, H channels of half a projection; T tokens. Offsets: 64-bit up to a program's first row, then 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Otherwise Triton would compile a kernel again depending on whether a number of positions is divisible by 16,
# and on the alignment of a parameter in ZeRO-3's flat buffer.
_kernel = triton.jit(
    do_not_specialize=("S", "groups", "length", "R", "T", "units"),
    do_not_specialize_on_alignment=("weight", "bias"),
)


@triton.jit
def _program_segment(S, C, length, COLUMNS: tl.constexpr):
    """Return this program's segment, the segment's unit, first row and number of rows, and its channels."""
    tiles = tl.cdiv(C, COLUMNS)
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    segments = tl.cdiv(S, length)
    unit, start = segment // segments, segment % segments * length
    return segment, unit, unit * S + start, tl.minimum(length, S - start).to(tl.int32), columns


@triton.jit
def _tile(first, count, columns, C, ROWS: tl.constexpr):
    """Return the offsets of ROWS rows from `first` on, and the mask of elements inside the tensor."""
    rows = first + tl.arange(0, ROWS)[:, None]
    return rows * C + columns, (rows < count) & (columns < C)


@triton.jit
def _load_group_values(values_NG, unit, columns, C, groups):
    """Load for each channel the value of its group."""
    return tl.load(values_NG + unit * groups + columns // (C // groups), columns < C, 0.0)


@triton.jit
def _load_channel_values(values_C, columns, C):
    """Load the value of each channel, as float32."""
    return tl.load(values_C + columns, columns < C, 0.0).to(tl.float32)


@_kernel
def statistics(x, mean_PC, squares_PC, S, C, groups, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute, for each channel in a segment, the mean and the sum of squared differences from it."""
    segment, _, first_row, count, columns = _program_segment(S, C, length, COLUMNS)
    x += first_row * C
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        offsets, mask = _tile(first, count, columns, C, ROWS)
        value = tl.load(x + offsets, mask, 0.0).to(tl.float32)
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta * (1.0 / (first // ROWS + 1))
        squares += delta * (value - mean)
    # Each row of the tile has processed every ROWS-th position.
    num_rows_seen = tl.cdiv(tl.maximum(count - tl.arange(0, ROWS)[:, None], 0), ROWS).to(tl.float32)
    segment_mean = tl.sum(num_rows_seen * mean, axis=0, keep_dims=True) / count
    delta = mean - segment_mean
    segment_squares = tl.sum(squares + num_rows_seen * delta * delta, axis=0, keep_dims=True)
    tl.store(mean_PC + segment * C + columns, segment_mean, columns < C)
    tl.store(squares_PC + segment * C + columns, segment_squares, columns < C)


@triton.jit
def _program_group(S, C, groups, length, WIDTH: tl.constexpr):
    """Return this program's unit, the unit's number of segments, and the channels of its group."""
    channels = tl.arange(0, WIDTH)[None, :]
    first, segments = tl.program_id(0) % groups * (C // groups), tl.cdiv(S, length)
    unit = (tl.program_id(0) // groups).to(tl.int64)
    return unit, segments, first + channels, channels < C // groups


@_kernel
def combine_statistics(
    mean_PC, squares_PC, mean_NG, rstd_NG, S, C, groups, length, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Combine the statistics of segments and channels to mean and 1 / standard deviation of a group."""
    unit, segments, columns, inside = _program_group(S, C, groups, length, WIDTH)
    mean_PC += unit * segments * C
    squares_PC += unit * segments * C
    parts = tl.arange(0, PARTS)[:, None]
    size = 1.0 * S * (C // groups)
    sums = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, segments, PARTS):
        offsets, mask = _tile(first, segments, columns, C, PARTS)
        count = tl.minimum(S - (first + parts) * length, length)
        sums += count * tl.load(mean_PC + offsets, mask & inside, 0.0)
    mean = tl.sum(sums) / size
    sums = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, segments, PARTS):
        offsets, mask = _tile(first, segments, columns, C, PARTS)
        count = tl.minimum(S - (first + parts) * length, length)
        delta = tl.load(mean_PC + offsets, mask & inside, mean) - mean
        sums += tl.load(squares_PC + offsets, mask & inside, 0.0) + count * delta * delta
    tl.store(mean_NG + tl.program_id(0), mean)
    tl.store(rstd_NG + tl.program_id(0), tl.rsqrt(tl.sum(sums) / size + eps))


@_kernel
def normalise(
    x, weight, bias, mean_NG, rstd_NG, y, S, C, groups, length,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute z = weight n + bias with n = (x - mean) rstd, or the SiLU of z."""
    _, unit, first_row, count, columns = _program_segment(S, C, length, COLUMNS)
    x += first_row * C
    y += first_row * C
    mean = _load_group_values(mean_NG, unit, columns, C, groups)
    scale = _load_group_values(rstd_NG, unit, columns, C, groups) * _load_channel_values(weight, columns, C)
    shift = _load_channel_values(bias, columns, C)
    for first in range(0, count, ROWS):
        offsets, mask = _tile(first, count, columns, C, ROWS)
        z = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - mean) * scale + shift
        tl.store(y + offsets, z * tl.sigmoid(z) if SILU else z, mask)


@triton.jit
def _gradient(x, dy, offsets, mask, mean, rstd, scale, shift, SILU: tl.constexpr):
    """Return n, and the gradient of z."""
    n = (tl.load(x + offsets, mask, 0.0).to(tl.float32) - mean) * rstd
    dz = tl.load(dy + offsets, mask, 0.0).to(tl.float32)
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
    """Compute the sums of dz and of dz n over a segment, for each channel."""
    segment, unit, first_row, count, columns = _program_segment(S, C, length, COLUMNS)
    x += first_row * C
    dy += first_row * C
    mean = _load_group_values(mean_NG, unit, columns, C, groups)
    rstd = _load_group_values(rstd_NG, unit, columns, C, groups)
    scale, shift = _load_channel_values(weight, columns, C), _load_channel_values(bias, columns, C)
    sum_dz = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_dz_n = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        offsets, mask = _tile(first, count, columns, C, ROWS)
        n, dz = _gradient(x, dy, offsets, mask, mean, rstd, scale, shift, SILU)
        sum_dz += dz
        sum_dz_n += dz * n
    tl.store(dz_PC + segment * C + columns, tl.sum(sum_dz, axis=0, keep_dims=True), columns < C)
    tl.store(dz_n_PC + segment * C + columns, tl.sum(sum_dz_n, axis=0, keep_dims=True), columns < C)


@_kernel
def combine_gradient_sums(
    dz_PC, dz_n_PC, weight, dz_NC, dz_n_NC, dz_NG, dz_n_NG, S, C, groups, length,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Combine the sums to those of a unit, for each channel, and to the group's means of weight dz and weight
    dz n."""
    unit, segments, columns, inside = _program_group(S, C, groups, length, WIDTH)
    dz_PC += unit * segments * C
    dz_n_PC += unit * segments * C
    sum_dz = tl.zeros((PARTS, WIDTH), tl.float32)
    sum_dz_n = tl.zeros((PARTS, WIDTH), tl.float32)
    for first in range(0, segments, PARTS):
        offsets, mask = _tile(first, segments, columns, C, PARTS)
        sum_dz += tl.load(dz_PC + offsets, mask & inside, 0.0)
        sum_dz_n += tl.load(dz_n_PC + offsets, mask & inside, 0.0)
    dz, dz_n = tl.sum(sum_dz, axis=0, keep_dims=True), tl.sum(sum_dz_n, axis=0, keep_dims=True)
    tl.store(dz_NC + unit * C + columns, dz, inside)
    tl.store(dz_n_NC + unit * C + columns, dz_n, inside)
    share = tl.load(weight + columns, inside, 0.0).to(tl.float32) / (1.0 * S * (C // groups))
    tl.store(dz_NG + tl.program_id(0), tl.sum(share * dz))
    tl.store(dz_n_NG + tl.program_id(0), tl.sum(share * dz_n))


@_kernel
def norm_backward(
    x, dy, weight, bias, mean_NG, rstd_NG, dz_NG, dz_n_NG, dx, S, C, groups, length,
    SILU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dx = rstd (weight dz - <weight dz> - n <weight dz n>), with <.> the mean over a group."""
    _, unit, first_row, count, columns = _program_segment(S, C, length, COLUMNS)
    x += first_row * C
    dy += first_row * C
    dx += first_row * C
    mean = _load_group_values(mean_NG, unit, columns, C, groups)
    rstd = _load_group_values(rstd_NG, unit, columns, C, groups)
    scale, shift = _load_channel_values(weight, columns, C), _load_channel_values(bias, columns, C)
    mean_dz = _load_group_values(dz_NG, unit, columns, C, groups)
    mean_dz_n = _load_group_values(dz_n_NG, unit, columns, C, groups)
    for first in range(0, count, ROWS):
        offsets, mask = _tile(first, count, columns, C, ROWS)
        n, dz = _gradient(x, dy, offsets, mask, mean, rstd, scale, shift, SILU)
        tl.store(dx + offsets, rstd * (scale * dz - mean_dz - n * mean_dz_n), mask)


@_kernel
def geglu_kernel(proj, dy, out, R, H, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute hidden gelu(gate) for proj = [hidden, gate], or the gradient of proj (arXiv 2002.05202)."""
    tiles = tl.cdiv(H, COLUMNS)
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    columns = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    mask = (first + rows < R) & (columns < H)
    proj += first * (2 * H)
    hidden = tl.load(proj + rows * (2 * H) + columns, mask, 0.0).to(tl.float32)
    gate = tl.load(proj + rows * (2 * H) + H + columns, mask, 0.0).to(tl.float32)
    # The standard normal distribution function at the gate.
    share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    if BACKWARD:
        grad = tl.load(dy + first * H + rows * H + columns, mask, 0.0).to(tl.float32)
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        out += first * (2 * H)
        tl.store(out + rows * (2 * H) + columns, grad * gate * share, mask)
        tl.store(out + rows * (2 * H) + H + columns, grad * hidden * slope, mask)
    else:
        tl.store(out + first * H + rows * H + columns, hidden * gate * share, mask)


@triton.jit
def _token_offsets(
    clip_stride, unit_stride, token_stride, head_stride, units, heads, T,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the start of this program's clip, unit and head, the offsets of its tokens, and the tokens'
    mask."""
    unit = (tl.program_id(0) // heads).to(tl.int64)
    start = unit // units * clip_stride + unit % units * unit_stride + tl.program_id(0) % heads * head_stride
    tokens = tl.arange(0, TOKENS)[:, None]
    return start, tokens * token_stride + tl.arange(0, WIDTH)[None, :], tokens < T


@triton.jit
def _attention_weights(queries, keys, scale, T, TOKENS: tl.constexpr):
    """Compute softmax(q k^T scale) among T tokens; the tile has padding."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, TOKENS)[None, :] < T, scores, float("-inf"))
    raised = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
    return raised / tl.sum(raised, axis=1, keep_dims=True)


@_kernel
def attend(
    q, k, v, out, clip_stride, unit_stride, token_stride, head_stride, out_clip_stride, out_unit_stride,
    out_token_stride, out_head_stride, units, heads, T, scale, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute attention; a program has all tokens of one unit and head."""
    start, offsets, mask = _token_offsets(
        clip_stride, unit_stride, token_stride, head_stride, units, heads, T, TOKENS, WIDTH
    )
    queries, keys = tl.load(q + start + offsets, mask, 0.0), tl.load(k + start + offsets, mask, 0.0)
    values = tl.load(v + start + offsets, mask, 0.0)
    weights = _attention_weights(queries, keys, scale, T, TOKENS).to(values.dtype)
    start, offsets, mask = _token_offsets(
        out_clip_stride, out_unit_stride, out_token_stride, out_head_stride, units, heads, T, TOKENS, WIDTH
    )
    tl.store(out + start + offsets, tl.dot(weights, values, input_precision="ieee"), mask)


@_kernel
def attend_backward(
    q, k, v, dout, dq, dk, dv, clip_stride, unit_stride, token_stride, head_stride, out_clip_stride,
    out_unit_stride, out_token_stride, out_head_stride, units, heads, T, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradients, in the layout of the inputs; the weights are recomputed."""
    start, offsets, mask = _token_offsets(
        clip_stride, unit_stride, token_stride, head_stride, units, heads, T, TOKENS, WIDTH
    )
    queries, keys = tl.load(q + start + offsets, mask, 0.0), tl.load(k + start + offsets, mask, 0.0)
    values = tl.load(v + start + offsets, mask, 0.0)
    out_start, out_offsets, _ = _token_offsets(
        out_clip_stride, out_unit_stride, out_token_stride, out_head_stride, units, heads, T, TOKENS, WIDTH
    )
    grad = tl.load(dout + out_start + out_offsets, mask, 0.0)
    weights = _attention_weights(queries, keys, scale, T, TOKENS)
    dvalues = tl.dot(tl.trans(weights.to(values.dtype)), grad, input_precision="ieee")
    dweights = tl.dot(grad, tl.trans(values), input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1, keep_dims=True)) * scale
    dscores = dscores.to(values.dtype)
    tl.store(dv + start + offsets, dvalues, mask)
    tl.store(dq + start + offsets, tl.dot(dscores, keys, input_precision="ieee"), mask)
    tl.store(dk + start + offsets, tl.dot(tl.trans(dscores), queries, input_precision="ieee"), mask)


INTERPRETED = not isinstance(geglu_kernel, triton.JITFunction)
"""True if TRITON_INTERPRET=1 at the time of import: the kernels then run as Python, on any processor."""
