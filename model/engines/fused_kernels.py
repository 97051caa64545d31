"""Triton kernels of the fused engine: they gather features while they multiply. fused.py calls them in order.

Feature maps are (P, C) per image: one row per pixel, channels padded with zeros to C, a power of two of at least 16.
In the map of a layer, dense channels come first, and only the rows of important pixels are valid. The dense channels of
all pixels are in a map of their own, (P, D), padded to a power of two. For an important pixel a load reads its row of
the first map, for another pixel its row of the second, followed by zeros. Kernels run on a grid (tiles, images),
`reduce` on all images at once. Names in capitals are compile-time constants.

    H, W      height and width of the features, even; the image may be one row or column smaller
    PH, PW    height and width of the pooled map, half as high and wide
    R         hidden channels of the mask branch, padded
    BM        pixels per tile
    DOT       precision of float32 products: "tf32" or "ieee"
"""

import triton
import triton.language as tl

# One compiled kernel serves all sizes, and pointers into the middle of a tensor.
kernel = triton.jit(
    do_not_specialize=[
        *("H", "W", "PH", "PW", "P", "height", "width", "stride", "sums_stride"),
        *("sn", "sc", "sh", "sw"),
    ],
    do_not_specialize_on_alignment=["x", "total", "mask", "counts", "finished", "not_finite"],
)

SUM_SCALE = tl.constexpr(2.0**20)  # of sums that are kept as integers
COLUMNS = tl.constexpr(16)  # of a tile of a map
POOLED_COLUMNS = tl.constexpr(8)


@kernel
def _tile(t, W, BM: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of the BM pixels of tile t of a map with W columns; those beyond its end are in no tile."""
    across = tl.cdiv(W, COLUMNS)
    i = tl.arange(0, BM)
    return t // across * (BM // COLUMNS) + i // COLUMNS, t % across * COLUMNS + i % COLUMNS


@kernel
def _load_image(x, n, color, row, col, height, width, sn, sc, sh, sw, mask):
    """Pixels of an image (N, colors, height, width), replicated beyond its last row and column."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    col = tl.minimum(tl.maximum(col, 0), width - 1)
    at = n * sn + color * sc + row * sh + col * sw
    return tl.load(x + at, mask=mask, other=0.0)


@kernel
def first_conv(
    x,
    mean,
    w,
    bias,
    out,
    not_finite,
    height,
    width,
    sn,
    sc,
    sh,
    sw,
    H,
    W,
    COLORS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    DOT: tl.constexpr,
):
    """The image without its mean, conv 3x3 (COLORS -> C), ReLU. K: 9 COLORS, padded. Sets the flag `not_finite`."""
    n = tl.program_id(1).to(tl.int64)
    row, col = _tile(tl.program_id(0), W, BM=BM, COLUMNS=COLUMNS)
    valid = ((row < H) & (col < W))[:, None]
    k = tl.arange(0, K)[None, :]
    tap, color = k // COLORS, k % COLORS
    y, z = row[:, None] + tap // 3 - 1, col[:, None] + tap % 3 - 1
    inside = (k < 9 * COLORS) & valid & (y >= 0) & (y < H) & (z >= 0) & (z < W)
    v = _load_image(x, n, color, y, z, height, width, sn, sc, sh, sw, inside)
    if tl.max(tl.max(((v - v) != 0).to(tl.int32), 1), 0) > 0:
        tl.store(not_finite, 1)
    m = tl.load(mean + color, mask=k < 9 * COLORS, other=0.0)
    v = tl.where(inside, v.to(tl.float32) - m.to(tl.float32), 0.0).to(out.dtype.element_ty)
    c = tl.arange(0, C)
    acc = tl.dot(v, tl.load(w + tl.arange(0, K)[:, None] * C + c[None, :]), input_precision=DOT)
    acc = tl.maximum(acc + tl.load(bias + c)[None, :].to(tl.float32), 0.0)
    at = (row * W + col)[:, None] * C + c[None, :]
    tl.store(out + n * H * W * C + at, acc.to(out.dtype.element_ty), mask=valid)


@kernel
def conv3x3(
    src,
    w,
    bias,
    add,
    out,
    H,
    W,
    C: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> C) with bias, plus the map `add` if ADD."""
    n = tl.program_id(1).to(tl.int64)
    src += n * H * W * C
    row, col = _tile(tl.program_id(0), W, BM=BM, COLUMNS=COLUMNS)
    valid = (row < H) & (col < W)
    p = row * W + col
    c = tl.arange(0, C)
    acc = tl.zeros((BM, C), tl.float32)
    for tap in tl.range(9, num_stages=STAGES):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = valid & (row + dy >= 0) & (row + dy < H) & (col + dx >= 0) & (col + dx < W)
        at = (p + dy * W + dx)[:, None] * C + c[None, :]
        a = tl.load(src + at, mask=inside[:, None], other=0.0)
        b = tl.load(w + (tap * C + c[:, None]) * C + c[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    acc += tl.load(bias + c)[None, :].to(tl.float32)
    at = n * H * W * C + p[:, None] * C + c[None, :]
    if ADD:
        acc += tl.load(add + at, mask=valid[:, None], other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])


@kernel
def _convolve_windows(
    src,
    w,
    bias,
    py,
    px,
    valid,
    H,
    W,
    STEP: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> R) with bias at 2x2 pixels each: the 4x4 window around them times weights (16, C, 4 R).

    The window of (py, px) starts at the row STEP py - 1 and the column STEP px - 1 of the map `src` (H, W, C). A step
    multiplies CHUNK channels of one of its pixels.
    Returns (BM, 4 R), float32: the outputs of the pixels top left, top right, bottom left, bottom right.
    """
    k = tl.arange(0, 4 * R)
    acc = tl.zeros((BM, 4 * R), tl.float32)
    for step in tl.range(16 * (C // CHUNK), num_stages=STAGES):
        tap = step // (C // CHUNK)
        c = step % (C // CHUNK) * CHUNK + tl.arange(0, CHUNK)
        y = STEP * py - 1 + tap // 4
        x = STEP * px - 1 + tap % 4
        inside = valid & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        at = (y * W + x)[:, None] * C + c[None, :]
        a = tl.load(src + at, mask=inside[:, None], other=0.0)
        b = tl.load(w + (tap * C + c[:, None]) * 4 * R + k[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc + tl.load(bias + k)[None, :].to(tl.float32)


@kernel
def mask_pool(
    f,
    w,
    bias,
    out,
    H,
    W,
    PH,
    PW,
    C: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> R), ReLU, average pool 2. Weights w: (16, C, 4 R), as in `_convolve_windows`."""
    n = tl.program_id(1).to(tl.int64)
    f += n * H * W * C
    py, px = _tile(tl.program_id(0), PW, BM=BM, COLUMNS=POOLED_COLUMNS)
    valid = (py < PH) & (px < PW)
    acc = _convolve_windows(f, w, bias, py, px, valid, H, W, STEP=2, C=C, CHUNK=C, R=R, BM=BM, STAGES=STAGES, DOT=DOT)
    pooled = tl.sum(tl.reshape(tl.maximum(acc, 0.0), (BM, 4, R)), 1) * 0.25
    r = tl.arange(0, R)
    at = n * PH * PW * R + (py * PW + px)[:, None] * R + r[None, :]
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=valid[:, None])


@kernel
def mask_decide(
    src,
    w,
    bias,
    decide,
    decide_bias,
    mask,
    counts,
    W,
    PH,
    PW,
    R: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """On the pooled map: conv 3x3 (R -> R), ReLU, and a transposed conv 3x3 (R -> 1, stride 2) to the mask.

    The transposed convolution gives the difference of the two logits, compared in float32. A pooled pixel decides on
    the 2x2 pixels that it covers; they depend on the features of the 2x2 pooled pixels that begin there.

    w       (16, R, 4 R), as in `_convolve_windows`; decide: (4, 4 R), from these features to each of the 2x2 pixels
    counts  (N, tiles), important pixels of each tile
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    src += n * PH * PW * R
    py, px = _tile(t, PW, BM=BM, COLUMNS=POOLED_COLUMNS)
    valid = (py < PH) & (px < PW)
    acc = _convolve_windows(
        src, w, bias, py, px, valid, PH, PW, STEP=1, C=R, CHUNK=R, R=R, BM=BM, STAGES=STAGES, DOT=DOT
    )
    k = tl.arange(0, 4 * R)
    inside = (py[:, None] + (k // (2 * R))[None, :] < PH) & (px[:, None] + (k // R % 2)[None, :] < PW)
    acc = tl.where(inside, tl.maximum(acc, 0.0), 0.0)
    mask += n * 4 * PH * PW + 2 * py * W + 2 * px
    total = tl.zeros((BM,), tl.int32)
    for sub in tl.static_range(4):
        difference = tl.sum(acc * tl.load(decide + sub * 4 * R + k)[None, :], 1) + tl.load(decide_bias)
        important = ((difference > 0) & valid).to(tl.int32)
        tl.store(mask + sub // 2 * W + sub % 2, important.to(tl.uint8), mask=valid)
        total += important
    tl.store(counts + n * tl.num_programs(0) + t, tl.sum(total, 0))


@kernel
def _pixels_before(t, H, W, BM: tl.constexpr):
    """The pixels of a map (H, W) that lie in the tiles before tile t."""
    across = tl.cdiv(W, POOLED_COLUMNS)
    rows = BM // POOLED_COLUMNS
    above = t // across * rows
    return above * W + tl.minimum(rows, H - above) * (t % across) * POOLED_COLUMNS


@kernel
def kernel_map(mask, counts, order, bits, total, H, W, PH, PW, BM: tl.constexpr):
    """List the pixels, important ones from the front and others from the back, and look around each of them.

    Bits 0...8 of an entry of the list: this neighbor is important; bits 9...17: it lies inside the image. The tiles
    are the same as in `mask_decide`, whose counts determine every position, so all runs list pixels in the same order.
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    n_tiles = tl.num_programs(0)
    mask += n * H * W
    order += n * H * W
    bits += n * H * W
    counts += n * n_tiles
    j = tl.arange(0, 1024)
    partial = tl.zeros((1024,), tl.int32)
    for start in range(0, t, 1024):
        partial += tl.load(counts + start + j, mask=start + j < t, other=0)
    first = tl.sum(partial, 0)  # important pixels before this tile
    if t == n_tiles - 1:
        tl.store(total + n, first + tl.load(counts + t))
    py, px = _tile(t, PW, BM=BM, COLUMNS=POOLED_COLUMNS)
    valid = (py < PH) & (px < PW)
    last = 4 * _pixels_before(t, PH, PW, BM=BM) - first  # other pixels before this tile
    tap = tl.arange(0, 16)[None, :]
    for sub in tl.static_range(4):
        row, col = 2 * py + sub // 2, 2 * px + sub % 2
        p = row * W + col
        y = row[:, None] + tap // 3 - 1
        x = col[:, None] + tap % 3 - 1
        inside = valid[:, None] & (tap < 9) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        important = tl.load(mask + y * W + x, mask=inside, other=0).to(tl.int32)
        found = tl.sum((important << tap) | (inside.to(tl.int32) << (tap + 9)), 1)  # each tap has its own bits
        m = ((found >> 4) & 1) * valid.to(tl.int32)
        o = valid.to(tl.int32) - m
        front = first + tl.cumsum(m, 0) - m
        back = H * W - 1 - (last + tl.cumsum(o, 0) - o)
        at = tl.where(m != 0, front, back)
        tl.store(order + at, p, mask=valid)
        tl.store(bits + at, found, mask=valid)
        first += tl.sum(m, 0)
        last += tl.sum(o, 0)


@kernel
def _collect(
    f,
    maps,
    w,
    bias,
    p,
    valid,
    stride,
    C: tl.constexpr,
    BM: tl.constexpr,
    LAYERS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """The 1x1 convolution (LAYERS C -> C) of all layers at pixels p: (BM, C). f (BM, C): the last layer's output."""
    c = tl.arange(0, C)
    z = tl.zeros((BM, C), tl.float32) + tl.load(bias + c)[None, :].to(tl.float32)
    z = tl.dot(f, tl.load(w + ((LAYERS - 1) * C + c[:, None]) * C + c[None, :]), z, input_precision=DOT)
    for j in tl.range(LAYERS - 1, num_stages=STAGES if C <= 64 else 2):
        a = tl.load(maps + j * stride + p[:, None] * C + c[None, :], mask=valid[:, None], other=0.0)
        z = tl.dot(a, tl.load(w + (j * C + c[:, None]) * C + c[None, :]), z, input_precision=DOT)
    return z


@kernel
def _attention(
    sums,
    others,
    collect,
    bias,
    w1,
    b1,
    w2,
    b2,
    P,
    C: tl.constexpr,
    R: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Channel attention (C -> R -> C) of the collected map, from its mean: (C,). Its weights are float32.

    The mean follows from sums (LAYERS + 1, C): of the dense outputs of each layer at the `others` of the P pixels, zero
    for sparse outputs, and of what was collected at the important ones.
    """
    c = tl.arange(0, C)
    r = tl.arange(0, R)
    # Other programs have just added to the sums, in the second-level cache.
    mean = tl.load(sums + LAYERS * C + c, cache_modifier=".cg").to(tl.float32) / SUM_SCALE
    mean += others.to(tl.float32) * tl.load(bias + c).to(tl.float32)
    i = tl.arange(0, C)
    for j in range(LAYERS):  # summing and the 1x1 convolution can change places
        inputs = tl.load(sums + j * C + i, cache_modifier=".cg").to(tl.float32) / SUM_SCALE
        weights = tl.load(collect + (j * C + i[:, None]) * C + c[None, :]).to(tl.float32)
        mean += tl.sum(inputs[:, None] * weights, 0)
    mean = mean / P
    h = tl.sum(tl.load(w1 + r[:, None] * C + c[None, :]) * mean[None, :], 1) + tl.load(b1 + r)
    h = tl.maximum(h, 0.0)
    return tl.sigmoid(tl.sum(tl.load(w2 + c[:, None] * R + r[None, :]) * h[None, :], 1) + tl.load(b2 + c))


@kernel
def important_layer(
    src,
    dense,
    maps,
    w,
    collect,
    bias,
    order,
    bits,
    total,
    out,
    dense_out,
    sums,
    w1,
    b1,
    w2,
    b2,
    factor,
    finished,
    H,
    W,
    stride,
    C: tl.constexpr,
    R: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    LAYERS: tl.constexpr,
    LAST: tl.constexpr,
    DOT: tl.constexpr,
):
    """A sparse mask convolution at the important pixels: all outputs from all inputs that are computed, and ReLU.

    The LAST layer of a module does not store them: it collects all layers (1x1). The program that finishes last then
    computes the channel attention.

    src        the map that this layer reads
    dense      the map (P, D_IN) of its dense channels; D_IN is 0 if there are none
    maps       the outputs of the layers, `stride` numbers apart
    w          (9, C, C); collect: (LAYERS, C, C); bias: (C,), all inputs first
    out        the map that this layer writes
    dense_out  the map (P, D_OUT) of its dense channels
    sums       (N, LAYERS + 1, C) int64, as in `_attention`; the LAST layer adds its result
    factor     (N, C) float32, the attention
    finished   (N,) int64, number of programs that have finished, initially 0
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    count = tl.load(total + n)
    stride = tl.multiple_of(tl.cast(stride, tl.int64), 16)  # j * stride may not fit into 32 bits
    n_programs = tl.maximum(tl.cdiv(count, BM), 1)
    if t < n_programs:
        offset = n * H * W
        i = t * BM + tl.arange(0, BM)
        valid = i < count
        p = tl.load(order + offset + i, mask=valid, other=0)
        around = tl.load(bits + offset + i, mask=valid, other=0)
        src += offset * C
        dense += offset * D_IN
        c = tl.arange(0, C)
        center, around = p[:, None], around[:, None]  # here: in the loop, threads would exchange them at every step
        acc = tl.zeros((BM, C), tl.float32)
        for tap in tl.range(9, num_stages=STAGES):
            q = center + (tap // 3 - 1) * W + tap % 3 - 1
            important = ((around >> tap) & 1) != 0
            inside = ((around >> (tap + 9)) & 1) != 0
            row = tl.where(important, src + q * C, dense + q * D_IN)
            keep = important | (inside & (c < D_IN)[None, :])
            a = tl.load(row + c[None, :], mask=keep, other=0.0)
            b = tl.load(w + (tap * C + c[:, None]) * C + c[None, :])
            acc = tl.dot(a, b, acc, input_precision=DOT)
        f = tl.maximum(acc, 0.0).to(out.dtype.element_ty)
        out += offset * C
        at = p[:, None] * C + c[None, :]
        if LAST:
            maps += offset * C
            z = _collect(f, maps, collect, bias, p, valid, stride, C=C, BM=BM, LAYERS=LAYERS, STAGES=STAGES, DOT=DOT)
            tl.store(out + at, z.to(out.dtype.element_ty), mask=valid[:, None])
            sums += n * (LAYERS + 1) * C
            _add_to_sums(sums + LAYERS * C + c, z, valid)
            tl.debug_barrier()  # all threads have added
            if tl.atomic_add(finished + n, 1) == n_programs - 1:
                others, pixels = H * W - count, H * W
                attention = _attention(sums, others, collect, bias, w1, b1, w2, b2, pixels, C=C, R=R, LAYERS=LAYERS)
                tl.store(factor + n * C + c, attention)
        else:
            tl.store(out + at, f, mask=valid[:, None])
            if D_OUT > 0:
                at = dense_out + offset * D_OUT + p[:, None] * D_OUT + c[None, :]
                tl.store(at, f, mask=valid[:, None] & (c < D_OUT)[None, :])


@kernel
def _add_to_sums(sums, values, valid):
    """Add the rows of values (BM, C) that are valid. Integers, so that the order of additions is irrelevant."""
    total = tl.sum(tl.where(valid[:, None], values.to(tl.float32), 0.0), 0)
    tl.atomic_add(sums, (total * SUM_SCALE).to(tl.int64))


@kernel
def dense_layer(
    src,
    out,
    w,
    order,
    bits,
    total,
    sums,
    H,
    W,
    sums_stride,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """A sparse mask convolution at the other pixels: dense outputs from dense inputs, and ReLU.

    src   the map (P, D_IN) of the dense inputs
    out   the map (P, D_OUT) of the dense outputs
    w     (9, D_IN, D_OUT), padded
    sums  (N, C) int64, `sums_stride` numbers apart: the sums of the outputs over these pixels
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    count = H * W - tl.load(total + n)
    if t * BM < count:
        offset = n * H * W
        i = t * BM + tl.arange(0, BM)
        valid = i < count
        p = tl.load(order + offset + H * W - 1 - i, mask=valid, other=0)
        around = tl.load(bits + offset + H * W - 1 - i, mask=valid, other=0)
        src += offset * D_IN
        ci = tl.arange(0, D_IN)
        co = tl.arange(0, D_OUT)
        center, around = p[:, None], around[:, None]
        acc = tl.zeros((BM, D_OUT), tl.float32)
        for tap in tl.range(9, num_stages=STAGES):
            q = center + (tap // 3 - 1) * W + tap % 3 - 1
            inside = ((around >> (tap + 9)) & 1) != 0
            a = tl.load(src + q * D_IN + ci[None, :], mask=inside, other=0.0)
            b = tl.load(w + (tap * D_IN + ci[:, None]) * D_OUT + co[None, :])
            acc = tl.dot(a, b, acc, input_precision=DOT)
        f = tl.maximum(acc, 0.0).to(out.dtype.element_ty)
        tl.store(out + offset * D_OUT + p[:, None] * D_OUT + co[None, :], f, mask=valid[:, None])
        _add_to_sums(sums + n * sums_stride + co, f, valid)


@kernel
def attend(
    f,
    y,
    dense,
    collect,
    bias,
    mask,
    factor,
    out,
    P,
    stride,
    C: tl.constexpr,
    BM: tl.constexpr,
    LAYERS: tl.constexpr,
    DENSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """f + z * attention. z is the map y at important pixels; elsewhere it is collected here, from dense channels.

    Collect (LAYERS, C, C), bias (C,) and factor (N, C) are as in `important_layer`.

    dense   the maps (N, P, D) of the dense channels of all layers, one after the other
    stride  N P
    DENSE   dense channels of each layer, padded, 8 bits per layer
    """
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    valid = p < P
    important = tl.load(mask + n * P + p, mask=valid, other=0) != 0
    other = (valid & (important == 0))[:, None]
    stride = tl.cast(stride, tl.int64)
    z = tl.zeros((BM, C), tl.float32) + tl.load(bias + c)[None, :].to(tl.float32)
    for j in tl.static_range(LAYERS):
        if (DENSE >> (8 * j)) & 255 > 0:
            i = tl.arange(0, (DENSE >> (8 * j)) & 255)
            a = tl.load(dense + (n * P + p)[:, None] * ((DENSE >> (8 * j)) & 255) + i[None, :], mask=other, other=0.0)
            b = tl.load(collect + (j * C + i[:, None]) * C + c[None, :])
            z = tl.dot(a, b, z, input_precision=DOT)
            dense += stride * ((DENSE >> (8 * j)) & 255)
    at = (n * P + p)[:, None] * C + c[None, :]
    z = tl.where(important[:, None], tl.load(y + at, mask=important[:, None], other=0.0).to(tl.float32), z)
    v = tl.load(f + at, mask=valid[:, None], other=0.0).to(tl.float32) + z * tl.load(factor + n * C + c)[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=valid[:, None])


@kernel
def reduce(
    features,
    w,
    bias,
    out,
    P,
    stride,
    BLOCKS: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """The 1x1 convolution (BLOCKS C -> C) of the outputs of all modules, `stride` numbers apart, and its ReLU."""
    p = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    c = tl.arange(0, C)
    valid = (p < P)[:, None]
    at = p[:, None] * C + c[None, :]
    stride = tl.multiple_of(tl.cast(stride, tl.int64), 16)
    z = tl.zeros((BM, C), tl.float32) + tl.load(bias + c)[None, :].to(tl.float32)
    for k in tl.range(BLOCKS, num_stages=STAGES):
        a = tl.load(features + k * stride + at, mask=valid, other=0.0)
        b = tl.load(w + k * C * C + c[:, None] * C + c[None, :])
        z = tl.dot(a, b, z, input_precision=DOT)
    tl.store(out + at, tl.maximum(z, 0.0).to(out.dtype.element_ty), mask=valid)


@kernel
def reconstruct(
    src,
    w,
    bias,
    x,
    bicubic,
    sr,
    height,
    width,
    sn,
    sc,
    sh,
    sw,
    H,
    W,
    PH,
    PW,
    COLORS: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> K), pixel shuffle, plus the bicubically upsampled image; K: COLORS SCALE^2, padded.

    Upsampling is a 5x5 convolution of the image before the shuffle. Both are computed for 2x2 pixels at a time, from
    4x4 features and 6x6 pixels of the image.

    w       (16, C, 4 K), as in `_convolve_windows`
    bicubic (2, TAPS, 4 K): its weights, each as a sum of two numbers; TAPS: 36 COLORS, padded
    sr      (N, COLORS, SCALE height, SCALE width)
    """
    n = tl.program_id(1).to(tl.int64)
    src += n * H * W * C
    py, px = _tile(tl.program_id(0), PW, BM=BM, COLUMNS=POOLED_COLUMNS)
    valid = (py < PH) & (px < PW)
    acc = _convolve_windows(
        src, w, bias, py, px, valid, H, W, STEP=2, C=C, CHUNK=CHUNK, R=K, BM=BM, STAGES=STAGES, DOT=DOT
    )
    k = tl.arange(0, 4 * K)
    for start in tl.range(0, TAPS, 16, num_stages=1):
        tap = start + tl.arange(0, 16)
        y = 2 * py[:, None] + (tap % 36 // 6 - 2)[None, :]
        z = 2 * px[:, None] + (tap % 6 - 2)[None, :]
        keep = valid[:, None] & (tap < 36 * COLORS)[None, :]
        v = _load_image(x, n, (tap // 36)[None, :], y, z, height, width, sn, sc, sh, sw, keep)
        at = bicubic + tap[:, None] * 4 * K + k[None, :]
        acc = tl.dot(v, tl.load(at), acc, input_precision="ieee")
        if x.dtype.element_ty != tl.float32:
            acc = tl.dot(v, tl.load(at + TAPS * 4 * K), acc, input_precision="ieee")
    row, col = 2 * py[:, None] + (k // (2 * K))[None, :], 2 * px[:, None] + (k // K % 2)[None, :]
    color, sub = (k % K // (SCALE * SCALE))[None, :], (k % K % (SCALE * SCALE))[None, :]
    line = (n * COLORS + color) * (SCALE * height) + SCALE * row + sub // SCALE
    at = line * (SCALE * width) + SCALE * col + sub % SCALE
    keep = valid[:, None] & (row < height) & (col < width) & (color < COLORS)
    tl.store(sr + at, acc.to(sr.dtype.element_ty), mask=keep)
