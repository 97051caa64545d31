"""Triton kernels of the fused engine: they gather features while they multiply. fused.py calls them in order.

Feature maps are (P, C) per image: one row per pixel, channels padded with zeros to C, a power of two of at least 16.
In the map of a layer, dense channels come first. The row of an unimportant pixel is valid only in its dense channels,
padded to a power of two: a load asks for "important, or a dense channel" and gets zeros elsewhere. Every kernel runs on
a grid (tiles, images). Names in capitals are compile-time constants; N_ counts, *_W are weights.

    H, W      height and width of the features, even; the image may be one row or column smaller
    PW, PP    width and number of pixels of the pooled map, half as high and wide
    R         hidden channels of the mask branch, padded
    BM        pixels per tile
    DOT       precision of float32 products: "tf32" or "ieee"
"""

import triton
import triton.language as tl

POOL_SCALE = tl.constexpr(
    2.0**20
)  # pooled sums are integers of this scale, so that the order of additions is irrelevant


@triton.jit
def _load_image(x, n, color, row, col, height, width, sn, sc, sh, sw, mask):
    """Pixels of an image (N, colors, height, width), replicated beyond its last row and column."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    col = tl.minimum(tl.maximum(col, 0), width - 1)
    at = n * sn + color * sc + row * sh + col * sw
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
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
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    row, col = (p // W)[:, None], (p % W)[:, None]
    k = tl.arange(0, K)[None, :]
    tap, color = k // COLORS, k % COLORS
    y, z = row + tap // 3 - 1, col + tap % 3 - 1
    inside = (k < 9 * COLORS) & (p < H * W)[:, None] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
    v = _load_image(x, n, color, y, z, height, width, sn, sc, sh, sw, inside)
    if tl.max(tl.max(((v - v) != 0).to(tl.int32), 1), 0) > 0:
        tl.store(not_finite, 1)
    m = tl.load(mean + color, mask=k < 9 * COLORS, other=0.0)
    v = tl.where(inside, v.to(tl.float32) - m.to(tl.float32), 0.0).to(out.dtype.element_ty)
    c = tl.arange(0, C)
    acc = tl.dot(v, tl.load(w + tl.arange(0, K)[:, None] * C + c[None, :]), input_precision=DOT)
    acc = tl.maximum(acc + tl.load(bias + c)[None, :].to(tl.float32), 0.0)
    at = p[:, None] * C + c[None, :]
    tl.store(out + n * H * W * C + at, acc.to(out.dtype.element_ty), mask=(p < H * W)[:, None])


@triton.jit
def _convolve(
    src, w, p, H, W, C: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr
):
    """conv 3x3 (C -> K) of the map `src` at the pixels p: (BM, K). Weights w: (9, C, K)."""
    row, col = p // W, p % W
    c = tl.arange(0, C)
    k = tl.arange(0, K)
    acc = tl.zeros((BM, K), tl.float32)
    for tap in tl.range(9, num_stages=STAGES):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (p < H * W) & (row + dy >= 0) & (row + dy < H) & (col + dx >= 0) & (col + dx < W)
        a = tl.load(src + (p + dy * W + dx)[:, None] * C + c[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(w + (tap * C + c[:, None]) * K + k[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
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
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = p < H * W
    c = tl.arange(0, C)
    acc = _convolve(src, w, p, H, W, C=C, K=C, BM=BM, STAGES=STAGES, DOT=DOT)
    acc += tl.load(bias + c)[None, :].to(tl.float32)
    at = n * H * W * C + p[:, None] * C + c[None, :]
    if ADD:
        acc += tl.load(add + at, mask=valid[:, None], other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def mask_pool(
    f,
    w,
    bias,
    out,
    H,
    W,
    PW,
    PP,
    C: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> R), ReLU, average pool 2: the 4x4 window of a pooled pixel times weights (16, C, 4 R)."""
    n = tl.program_id(1).to(tl.int64)
    f += n * H * W * C
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = i < PP
    py, px = i // PW, i % PW
    c = tl.arange(0, C)
    k = tl.arange(0, 4 * R)
    acc = tl.zeros((BM, 4 * R), tl.float32)
    for tap in tl.range(16, num_stages=STAGES):
        y = 2 * py - 1 + tap // 4
        x = 2 * px - 1 + tap % 4
        inside = valid & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        a = tl.load(f + (y * W + x)[:, None] * C + c[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(w + (tap * C + c[:, None]) * 4 * R + k[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    acc = tl.maximum(acc + tl.load(bias + k)[None, :].to(tl.float32), 0.0)
    pooled = tl.sum(tl.reshape(acc, (BM, 4, R)), 1) * 0.25
    r = tl.arange(0, R)
    at = n * PP * R + i[:, None] * R + r[None, :]
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def mask_mid(src, w, bias, out, PH, PW, PP, R: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr):
    """conv 3x3 (R -> R), ReLU, on the pooled map."""
    n = tl.program_id(1).to(tl.int64)
    src += n * PP * R
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = i < PP
    py, px = i // PW, i % PW
    r = tl.arange(0, R)
    acc = tl.zeros((BM, R), tl.float32)
    for tap in tl.static_range(9):
        y = py + tap // 3 - 1
        x = px + tap % 3 - 1
        inside = valid & (y >= 0) & (y < PH) & (x >= 0) & (x < PW)
        a = tl.load(src + (y * PW + x)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, tl.load(w + (tap * R + r[:, None]) * R + r[None, :]), acc, input_precision=DOT)
    acc = tl.maximum(acc + tl.load(bias + r)[None, :].to(tl.float32), 0.0)
    at = n * PP * R + i[:, None] * R + r[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def mask_decide(src, w, bias, mask, counts, W, PH, PW, PP, R: tl.constexpr, BM: tl.constexpr):
    """Transposed conv 3x3 (R -> 1, stride 2) to the difference of the two logits: the mask, and its count per tile.

    A pooled pixel decides on the 2x2 pixels that it covers, in the order top left, top right, bottom left, bottom
    right. w (9, R) and the features are compared in float32.
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    src += n * PP * R
    i = t * BM + tl.arange(0, BM)
    valid = i < PP
    py, px = i // PW, i % PW
    r = tl.arange(0, R)
    at = i[:, None] * R + r[None, :]
    right, below = valid & (px + 1 < PW), valid & (py + 1 < PH)
    v00 = tl.load(src + at, mask=valid[:, None], other=0.0).to(tl.float32)
    v01 = tl.load(src + at + R, mask=right[:, None], other=0.0).to(tl.float32)
    v10 = tl.load(src + at + PW * R, mask=below[:, None], other=0.0).to(tl.float32)
    v11 = tl.load(src + at + (PW + 1) * R, mask=(right & below)[:, None], other=0.0).to(tl.float32)
    b = tl.load(bias)
    d0 = tl.sum(v00 * tl.load(w + 4 * R + r)[None, :], 1) + b
    d1 = tl.sum(v00 * tl.load(w + 5 * R + r)[None, :] + v01 * tl.load(w + 3 * R + r)[None, :], 1) + b
    d2 = tl.sum(v00 * tl.load(w + 7 * R + r)[None, :] + v10 * tl.load(w + 1 * R + r)[None, :], 1) + b
    d3 = tl.sum(v00 * tl.load(w + 8 * R + r)[None, :] + v01 * tl.load(w + 6 * R + r)[None, :], 1)
    d3 += tl.sum(v10 * tl.load(w + 2 * R + r)[None, :] + v11 * tl.load(w + r)[None, :], 1) + b
    m0 = ((d0 > 0) & valid).to(tl.int32)
    m1 = ((d1 > 0) & valid).to(tl.int32)
    m2 = ((d2 > 0) & valid).to(tl.int32)
    m3 = ((d3 > 0) & valid).to(tl.int32)
    mask += n * 4 * PP + 2 * py * W + 2 * px
    tl.store(mask, m0.to(tl.uint8), mask=valid)
    tl.store(mask + 1, m1.to(tl.uint8), mask=valid)
    tl.store(mask + W, m2.to(tl.uint8), mask=valid)
    tl.store(mask + W + 1, m3.to(tl.uint8), mask=valid)
    tl.store(counts + n * tl.num_programs(0) + t, tl.sum(m0 + m1 + m2 + m3, 0))


@triton.jit
def kernel_map(mask, counts, order, bits, total, H, W, PW, PP, BM: tl.constexpr):
    """List the pixels, important ones from the front and others from the back, and look around each of them.

    Bits 0...8 of a pixel: this neighbor is important; bits 9...17: it lies inside the image. The tiles are those of
    `mask_decide`, and every position follows from its counts, so the order is the same in every run.
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    n_tiles = tl.num_programs(0)
    mask += n * 4 * PP
    order += n * 4 * PP
    bits += n * 4 * PP
    counts += n * n_tiles
    j = tl.arange(0, 1024)
    partial = tl.zeros((1024,), tl.int32)
    for start in range(0, t, 1024):
        partial += tl.load(counts + start + j, mask=start + j < t, other=0)
    first = tl.sum(partial, 0)  # important pixels before this tile
    if t == n_tiles - 1:
        tl.store(total + n, first + tl.load(counts + t))
    i = t * BM + tl.arange(0, BM)
    valid = i < PP
    last = 4 * t * BM - first  # other pixels before this tile
    for sub in tl.static_range(4):
        row, col = 2 * (i // PW) + sub // 2, 2 * (i % PW) + sub % 2
        p = row * W + col
        found = tl.zeros((BM,), tl.int32)
        for tap in tl.static_range(9):
            y = row + tap // 3 - 1
            x = col + tap % 3 - 1
            inside = valid & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            important = tl.load(mask + y * W + x, mask=inside, other=0).to(tl.int32)
            found = found | (important << tap) | (inside.to(tl.int32) << (tap + 9))
        tl.store(bits + p, found, mask=valid)
        m = ((found >> 4) & 1) * valid.to(tl.int32)
        o = valid.to(tl.int32) - m
        front = first + tl.cumsum(m, 0) - m
        back = 4 * PP - 1 - (last + tl.cumsum(o, 0) - o)
        tl.store(order + tl.where(m != 0, front, back), p, mask=valid)
        first += tl.sum(m, 0)
        last += tl.sum(o, 0)


@triton.jit
def _convolve_important(
    src,
    w,
    p,
    around,
    W,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """All outputs from all inputs at the important pixels p: (BM, C). Weights w: (9, C, C)."""
    c = tl.arange(0, C)
    acc = tl.zeros((BM, C), tl.float32)
    for tap in tl.range(9, num_stages=STAGES):
        q = p + (tap // 3 - 1) * W + tap % 3 - 1
        important = ((around >> tap) & 1) != 0
        inside = ((around >> (tap + 9)) & 1) != 0
        keep = important[:, None] | (inside[:, None] & (c < D_IN)[None, :])
        a = tl.load(src + q[:, None] * C + c[None, :], mask=keep, other=0.0)
        b = tl.load(w + (tap * C + c[:, None]) * C + c[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def _convolve_dense(
    src,
    thin,
    p,
    around,
    W,
    C: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Dense outputs from dense inputs at the other pixels p: (BM, D_OUT). Weights thin: (9, D_IN, D_OUT)."""
    ci = tl.arange(0, D_IN)
    co = tl.arange(0, D_OUT)
    acc = tl.zeros((BM, D_OUT), tl.float32)
    for tap in tl.range(9, num_stages=STAGES):
        q = p + (tap // 3 - 1) * W + tap % 3 - 1
        inside = ((around >> (tap + 9)) & 1) != 0
        a = tl.load(src + q[:, None] * C + ci[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(thin + (tap * D_IN + ci[:, None]) * D_OUT + co[None, :])
        acc = tl.dot(a, b, acc, input_precision=DOT)
    return acc


@triton.jit
def _collect(
    f,
    maps,
    wc,
    bias,
    y,
    pooled,
    p,
    valid,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    LAYERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DOT: tl.constexpr,
):
    """The 1x1 collection of all layers at the pixels p, written to the map y and added to its sums.

    f (BM, K) is the output of the last layer. CHANNELS: channels to collect, 8 bits per layer.
    """
    c = tl.arange(0, C)
    z = tl.zeros((BM, C), tl.float32)
    if K > 0:
        k = tl.arange(0, K)
        b = tl.load(wc + (LAYERS - 1) * C * C + k[:, None] * C + c[None, :])
        z = tl.dot(f, b, z, input_precision=DOT)
    for j in tl.static_range(LAYERS - 1):
        if (CHANNELS >> (8 * j)) & 255 > 0:
            i = tl.arange(0, (CHANNELS >> (8 * j)) & 255)
            a = tl.load(maps + j * stride + p[:, None] * C + i[None, :], mask=valid[:, None], other=0.0)
            b = tl.load(wc + j * C * C + i[:, None] * C + c[None, :])
            z = tl.dot(a, b, z, input_precision=DOT)
    z += tl.load(bias + c)[None, :].to(tl.float32)
    tl.store(y + p[:, None] * C + c[None, :], z.to(y.dtype.element_ty), mask=valid[:, None])
    sums = tl.sum(tl.where(valid[:, None], z, 0.0), 0)
    tl.atomic_add(pooled + c, (sums * POOL_SCALE).to(tl.int64))


@triton.jit
def layer(
    src,
    maps,
    w,
    thin,
    wc,
    bias,
    order,
    bits,
    total,
    y,
    pooled,
    H,
    W,
    stride,
    C: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    LAYERS: tl.constexpr,
    INDEX: tl.constexpr,
    D_IN: tl.constexpr,
    D_OUT: tl.constexpr,
    DENSE: tl.constexpr,
    ALL: tl.constexpr,
):
    """One sparse mask convolution. The last one of a module also collects all layers (1x1) into the map y.

    The first tiles hold important pixels: all outputs from all inputs. The others hold dense outputs from dense inputs.

    src     the map that this layer reads
    maps    the outputs of the layers, `stride` numbers apart; the last layer has none
    w       (9, C, C); thin: (9, D_IN, D_OUT); wc: (LAYERS, C, C); bias: (C,), all inputs first
    pooled  (N, C) int64, sums of y over the pixels
    D_IN    dense channels of src; D_OUT: of the output; both padded; 0: none
    DENSE   dense channels of all layers, padded: 8 bits per layer; ALL: the same with C in place of each
    """
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    LAST: tl.constexpr = INDEX == LAYERS - 1
    stride = tl.cast(stride, tl.int64)  # j * stride may not fit into 32 bits
    offset = n * H * W * C
    src += offset
    maps += offset
    y += offset
    order += n * H * W
    bits += n * H * W
    pooled += n * C
    count = tl.load(total + n)
    tiles = tl.cdiv(count, BM)
    c = tl.arange(0, C)
    if t < tiles:
        i = t * BM + tl.arange(0, BM)
        valid = i < count
        p = tl.load(order + i, mask=valid, other=0)
        around = tl.load(bits + p, mask=valid, other=0)
        acc = _convolve_important(src, w, p, around, W, C=C, D_IN=D_IN, BM=BM, STAGES=STAGES, DOT=DOT)
        f = tl.maximum(acc, 0.0).to(y.dtype.element_ty)
        if LAST:
            _collect(
                f, maps, wc, bias, y, pooled, p, valid, stride, C=C, K=C, BM=BM, LAYERS=LAYERS, CHANNELS=ALL, DOT=DOT
            )
        else:
            tl.store(maps + INDEX * stride + p[:, None] * C + c[None, :], f, mask=valid[:, None])
    elif (LAST or D_OUT > 0) and (t - tiles) * BM < H * W - count:
        i = (t - tiles) * BM + tl.arange(0, BM)
        valid = i < H * W - count
        p = tl.load(order + H * W - 1 - i, mask=valid, other=0)
        f = tl.zeros((BM, 1), y.dtype.element_ty)
        if D_OUT > 0:
            around = tl.load(bits + p, mask=valid, other=0)
            acc = _convolve_dense(src, thin, p, around, W, C=C, D_IN=D_IN, D_OUT=D_OUT, BM=BM, STAGES=STAGES, DOT=DOT)
            f = tl.maximum(acc, 0.0).to(y.dtype.element_ty)
        if LAST:
            _collect(
                f,
                maps,
                wc,
                bias,
                y,
                pooled,
                p,
                valid,
                stride,
                C=C,
                K=D_OUT,
                BM=BM,
                LAYERS=LAYERS,
                CHANNELS=DENSE,
                DOT=DOT,
            )
        elif D_OUT > 0:
            co = tl.arange(0, D_OUT)
            tl.store(maps + INDEX * stride + p[:, None] * C + co[None, :], f, mask=valid[:, None])


@triton.jit
def attend(f, y, pooled, w1, b1, w2, b2, out, P, C: tl.constexpr, R: tl.constexpr, BM: tl.constexpr):
    """f + y * attention. Each tile computes the attention (C -> R -> C) from the pooled sums; weights are float32."""
    n = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    r = tl.arange(0, R)
    mean = tl.load(pooled + n * C + c).to(tl.float32) / (POOL_SCALE * P)
    h = tl.sum(tl.load(w1 + r[:, None] * C + c[None, :]) * mean[None, :], 1) + tl.load(b1 + r)
    h = tl.maximum(h, 0.0)
    factor = tl.sigmoid(tl.sum(tl.load(w2 + c[:, None] * R + r[None, :]) * h[None, :], 1) + tl.load(b2 + c))
    valid = (p < P)[:, None]
    at = n * P * C + p[:, None] * C + c[None, :]
    v = tl.load(f + at, mask=valid, other=0.0).to(tl.float32)
    v += tl.load(y + at, mask=valid, other=0.0).to(tl.float32) * factor[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=valid)


@triton.jit
def reduce(
    features, w, bias, out, P, stride, BLOCKS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr
):
    """The 1x1 convolution (BLOCKS C -> C) of the outputs of all modules, `stride` numbers apart, and its ReLU."""
    p = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    c = tl.arange(0, C)
    valid = (p < P)[:, None]
    at = p[:, None] * C + c[None, :]
    stride = tl.cast(stride, tl.int64)
    z = tl.zeros((BM, C), tl.float32) + tl.load(bias + c)[None, :].to(tl.float32)
    for k in tl.static_range(BLOCKS):
        a = tl.load(features + k * stride + at, mask=valid, other=0.0)
        b = tl.load(w + k * C * C + c[:, None] * C + c[None, :])
        z = tl.dot(a, b, z, input_precision=DOT)
    tl.store(out + at, tl.maximum(z, 0.0).to(out.dtype.element_ty), mask=valid)


@triton.jit
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
    COLORS: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """conv 3x3 (C -> K), pixel shuffle, plus the bicubically upsampled image; K: COLORS SCALE^2, padded.

    bicubic (25 COLORS, K), float32: upsampling is a 5x5 convolution of the image before the shuffle.
    sr (N, COLORS, SCALE height, SCALE width)
    """
    n = tl.program_id(1).to(tl.int64)
    src += n * H * W * C
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = p < H * W
    row, col = p // W, p % W
    k = tl.arange(0, K)
    acc = _convolve(src, w, p, H, W, C=C, K=K, BM=BM, STAGES=STAGES, DOT=DOT)
    acc += tl.load(bias + k)[None, :].to(tl.float32)
    for tap in range(25 * COLORS):
        y = row + (tap % 25) // 5 - 2
        z = col + tap % 5 - 2
        v = _load_image(x, n, tap // 25, y, z, height, width, sn, sc, sh, sw, valid).to(tl.float32)
        acc += v[:, None] * tl.load(bicubic + tap * K + k)[None, :]
    color, sub = k // (SCALE * SCALE), k % (SCALE * SCALE)
    line = (n * COLORS + color)[None, :] * (SCALE * height) + SCALE * row[:, None] + (sub // SCALE)[None, :]
    at = line * (SCALE * width) + SCALE * col[:, None] + (sub % SCALE)[None, :]
    keep = (valid & (row < height) & (col < width))[:, None] & (k < COLORS * SCALE * SCALE)[None, :]
    tl.store(sr + at, acc.to(sr.dtype.element_ty), mask=keep)
