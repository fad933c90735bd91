"""Attention over packed documents, forward and backward, without scores in memory and without atomics.

A tile is a block of tokens of one document. Which document tile t belongs to is found on the device, from cu_seqlens
alone: document i begins at tile cu[i] // BLOCK + i, a bound that needs no prefix sum; the tokens past cu[-1] are one
document more, which sees nothing. So the grid follows from shapes, and nothing waits for the host.

    forward   a program for a tile of queries and a query head
    delta     rowsum(out * dout) - dlse
    dk, dv    a program for a tile of keys and a key head: the query heads of a group are summed in registers
    dq        a program for a tile of queries and a query head

Each walks the blocks that the mask leaves whole, without a mask, and then those on both sides of them. Boundaries that
decrease or pass the end are brought back within the tensors: what comes out then means nothing, but is written inside.

Sources: Dao, "FlashAttention-2", 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemur_fast.kernels.common import LN2, LOG2E, architecture, next_power_of_2, on_device_of, tanh


class Tile(NamedTuple):
    """Tokens of a program's own block, tokens of the blocks that it walks, warps, and stages of the pipeline.

    `registers`: of a thread, at most, where the assembler aims at fewer than there are, and spills; 0 leaves it to it.
    """

    own: int
    walked: int
    num_warps: int
    num_stages: int
    registers: int = 0


class Tiles(NamedTuple):
    """The tiles of the three products."""

    forward: Tile
    dkdv: Tile
    dq: Tile


# By architecture and padded head dimension, for 16-bit inputs: tiles that compile without spills for every option
# (`make gpu-static` shows it), of those the best by `python -m benchmarks.gpu_tiles`. Other devices take those of sm_80
# or gfx942.
TILES: dict[str, dict[int, Tiles]] = {
    "sm_80": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(128, 32, 8, 3)),
        256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm_90": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        256: Tiles(Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(64, 32, 8, 2)),
    },
    "sm_100": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
        256: Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 16, 8, 2)),
    },
    "sm_120": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(128, 32, 8, 3)),
        256: Tiles(Tile(64, 16, 8, 2), Tile(32, 32, 8, 2), Tile(64, 16, 8, 2)),
    },
    "gfx942": {
        64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
        128: Tiles(Tile(128, 32, 8, 3), Tile(64, 16, 8, 2), Tile(128, 32, 8, 3)),
        256: Tiles(Tile(64, 32, 4, 2), Tile(32, 16, 8, 2), Tile(64, 16, 8, 2)),
    },
}
# As little shared memory as sm_120.
TILES["sm_89"] = TILES["sm_120"] | {256: TILES["sm_120"][256]._replace(forward=Tile(32, 32, 4, 2))}
# Narrow heads: few enough threads that each has 16 bytes of a block to load. A wavefront of AMD has 64.
for _tiles_of in TILES.values():
    _tiles_of[16] = _tiles_of[32] = Tiles(*[Tile(64, 64, 4, 2)] * 3)
TILES["gfx942"][16] = Tiles(*[Tile(64, 64, 2, 2)] * 3)

TILES_WITH_OPTIONS = {
    ("sm_80", 64): Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(128, 32, 8, 3)),
    ("sm_100", 64): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
}
"""With a window or a softcap, where the tiles of the next larger head dimension, which else serve, would spill."""

IN_FLOAT32 = {
    16: Tiles(Tile(16, 16, 1, 1), Tile(16, 64, 4, 1, registers=255), Tile(16, 16, 1, 1)),
    32: Tiles(Tile(16, 16, 1, 1), Tile(32, 32, 4, 1), Tile(16, 16, 1, 1)),
    64: Tiles(*[Tile(32, 16, 8, 1)] * 3),
    128: Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1)),
    256: Tiles(Tile(8, 16, 8, 1, registers=255), Tile(8, 16, 8, 1), Tile(16, 16, 8, 1)),
}
"""For float32 inputs, on every architecture; but see `IN_FLOAT32_ON_BLACKWELL`."""

IN_FLOAT32_ON_BLACKWELL = {256: IN_FLOAT32[256]._replace(dkdv=Tile(8, 16, 8, 2))}
"""What sm_100 and sm_120 have in place of those, which spill there with a window and a softcap."""


class Options(NamedTuple):
    """What the caller chooses: `window` 0 means all keys, `softcap` 0 none."""

    causal: bool
    window: int
    softcap: float
    scale: float


def _without_idle_window(options: Options, key_tokens: int) -> Options:
    """No window where it is as long as all keys: its sums with positions would pass 32 bits."""
    return options._replace(window=0) if options.window >= key_tokens else options


MeasuredTiles = tuple[tuple[int, int, int, int], ...]
"""`Tiles` without their names: as they are kept where they were measured, on the user's own device."""


def tiles_for(q: Tensor, options: Options, measured: MeasuredTiles | None = None) -> Tiles:
    """The tiles for queries ``[T, Hq, D]``; `measured` ones in place of the table's, where they may serve.

    They are measured in 16 bits, in heads of 64 and wider, without a window and a softcap: those need registers.
    """
    width = max(16, next_power_of_2(q.shape[2]))
    spared = 64 if q.element_size() > 2 else 32  # heads that have registers left for options
    wider = min(256, 2 * width) if width > spared and (options.window or options.softcap) else width
    if q.element_size() > 2:
        blackwell = architecture(q) in ("sm_100", "sm_120")
        return IN_FLOAT32_ON_BLACKWELL.get(wider, IN_FLOAT32[wider]) if blackwell else IN_FLOAT32[wider]
    if measured is not None and width >= 64 and not options.window and not options.softcap:
        return Tiles(*(Tile(*tile) for tile in measured))
    name = architecture(q)
    if name not in TILES:
        name = "gfx942" if name.startswith("gfx") else "sm_80"
    if wider > width and (name, width) in TILES_WITH_OPTIONS:
        return TILES_WITH_OPTIONS[name, width]
    return TILES[name][wider]


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles worth measuring beside one: a factor of 2 in one number, or a stage more or less."""
    own, walked, warps, stages, _ = tile
    yield from (tile._replace(walked=size) for size in (walked // 2, walked * 2) if size >= 16)
    yield from (tile._replace(own=size) for size in (own // 2, own * 2) if size >= 16)
    yield tile._replace(num_warps=4 if warps == 8 else 8)
    yield from (tile._replace(num_stages=number) for number in (stages - 1, stages + 1) if number >= 1)


# ---- which tokens a tile has -----------------------------------------------------------------------------------------


@triton.jit
def _boundary(cu, i, tokens):
    """cu[i], within [0, tokens]."""
    return tl.minimum(tl.maximum(tl.load(cu + i), 0), tokens)


@triton.jit
def _find_document(cu, tile, documents, tokens, BLOCK: tl.constexpr):
    """The largest i in [0, documents] with cu[i] // BLOCK + i <= tile."""
    low = 0
    high = documents + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _boundary(cu, middle, tokens) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _place(cu_own, cu_other, documents, own_tokens, other_tokens, tile, BLOCK: tl.constexpr):
    """Where a tile lies: its document's start and length on its own side and on the other, and its first token there.

    The document past the last one has nothing on the other side. Starts are int64.
    """
    i = _find_document(cu_own, tile, documents, own_tokens, BLOCK)
    start = _boundary(cu_own, i, own_tokens)
    first = (tile - (start // BLOCK + i)) * BLOCK
    if i < documents:
        length = tl.maximum(_boundary(cu_own, i + 1, own_tokens) - start, 0)
        other = _boundary(cu_other, i, other_tokens)
        other_length = tl.maximum(_boundary(cu_other, i + 1, other_tokens) - other, 0)
    else:
        length = own_tokens - start
        other = 0
        other_length = 0
    return start.to(tl.int64), length, tl.cast(other, tl.int64), other_length, first


# ---- one block against another ---------------------------------------------------------------------------------------


@triton.jit
def _rows(p, start, stride, d, ROWS: tl.constexpr):
    """Pointers to [ROWS, WIDTH] of a head from row `start` on; 64 bits, and made once, outside of loops."""
    return p + start * stride + (tl.arange(0, ROWS).to(tl.int64) * stride)[:, None] + d[None, :]


@triton.jit
def _load_rows(pointers, row, length, d, MASKED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """What `pointers` point to: zeros where `row` is past the `length` (if MASKED) and past the head dimension."""
    if MASKED:
        inside = (row < length)[:, None]
        if D != WIDTH:
            inside = inside & (d < D)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if D != WIDTH:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _products(a, b):
    """[A, B] products of the rows of a [A, WIDTH] and of b [B, WIDTH].

    In float32, which tensor cores do not have, a thread holds whole rows: so they are cut to 32 and summed afterwards.
    """
    CUTS: tl.constexpr = a.shape[1] // 32
    if a.dtype == tl.float32 and CUTS > 1:
        a_cut = tl.permute(tl.reshape(a, [a.shape[0], CUTS, 32]), [1, 0, 2])
        b_cut = tl.permute(tl.reshape(b, [b.shape[0], CUTS, 32]), [1, 2, 0])
        s = tl.sum(tl.dot(a_cut, b_cut, input_precision="ieee"), 0)
    else:
        s = tl.dot(a, tl.trans(b), input_precision="ieee")
    return s


@triton.jit
def _exponent(product, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2, and the derivative of the softcap."""
    if SOFTCAP:
        t = tanh(product * (scale / softcap))
        exponent = t * (softcap * LOG2E)
        slope = 1.0 - t * t
    else:
        exponent = product * (scale * LOG2E)
        slope = 1.0
    return exponent, slope


@triton.jit
def _seen(query, key, offset, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query sees a key; query i stands at the place of key i + offset."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= query + offset)
        if WINDOW:
            seen = seen & (key > query + offset - window)
    return seen


@triton.jit
def _attend(
    out, largest, total, queries, k, v, k_start, k_stride, v_stride, keys, query, offset, window, scale, softcap, d,
    begin, end, split, gap, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks the key blocks of [begin, split) and [split + gap, end)."""
    k_rows = _rows(k, k_start, k_stride, d, BLOCK)
    v_rows = _rows(v, k_start, v_stride, d, BLOCK)
    for step in range(begin, end - gap, BLOCK):
        first = step + tl.where(step >= split, gap, 0)
        key = first + tl.arange(0, BLOCK)
        block = _load_rows(k_rows + tl.cast(first, tl.int64) * k_stride, key, keys, d, MASKED, D, WIDTH)
        s = _products(queries, block)
        s, _ = _exponent(s, scale, softcap, SOFTCAP)
        if MASKED:
            s = tl.where(_seen(query[:, None], key[None, :], offset, keys, window, CAUSAL, WINDOW), s, -float("inf"))
        high = tl.maximum(largest, tl.max(s, 1))
        if MASKED:  # a row that has seen nothing yet stays at zero: -inf - 0, not -inf + inf
            base = tl.where(high == -float("inf"), 0.0, high)
        else:
            base = high
        p = tl.math.exp2(s - base[:, None])
        shrink = tl.math.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        block = _load_rows(v_rows + tl.cast(first, tl.int64) * v_stride, key, keys, d, MASKED, D, WIDTH)
        out = tl.dot(p.to(block.dtype), block, out * shrink[:, None], input_precision="ieee")
        largest = high
    return out, largest, total


@triton.jit
def _key_ranges(
    first, queries, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """[begin, whole), [whole, rest), [rest, end): keys that a tile of queries sees; those in the middle are seen whole.

    All but the end are multiples of BLOCK.
    """
    offset = keys - queries
    begin = 0
    whole = 0
    rest = keys // BLOCK * BLOCK
    end = keys
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(keys, tl.minimum(first + OWN, queries) + offset))
        rest = tl.maximum(0, tl.minimum(rest, (first + offset + 1) // BLOCK * BLOCK))
        if WINDOW:
            begin = tl.maximum(0, first + offset - window + 1) // BLOCK * BLOCK
            last = tl.minimum(first + OWN, queries) - 1
            whole = tl.maximum(0, last + offset - window + BLOCK) // BLOCK * BLOCK
            rest = tl.maximum(rest, begin)
            whole = tl.minimum(tl.maximum(whole, begin), rest)
    return begin, whole, rest, end


@triton.jit(do_not_specialize=["documents", "query_tokens", "key_tokens"])
def forward_kernel(
    q, k, v, out, lse, cu_seqlens, cu_seqlens_k, documents, query_tokens, key_tokens, scale, softcap, window,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a tile of queries and a query head, the last tiles first: they see the most keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_start, queries, k_start, keys, first = _place(
        cu_seqlens, cu_seqlens_k, documents, query_tokens, key_tokens, tile, OWN
    )  # fmt: skip
    if first < queries:
        query = first + tl.arange(0, OWN)
        d = tl.arange(0, WIDTH)
        pointers = _rows(q + head * q_head, q_start + first, q_token, d, OWN)
        block = _load_rows(pointers, query, queries, d, True, D, WIDTH)
        acc = tl.zeros([OWN, WIDTH], tl.float32)
        largest = tl.full([OWN], -float("inf"), tl.float32)
        total = tl.zeros([OWN], tl.float32)
        k_rows = k + head // GROUP * k_head
        v_rows = v + head // GROUP * v_head
        offset = keys - queries
        begin, whole, rest, end = _key_ranges(first, queries, keys, window, CAUSAL, WINDOW, OWN, BLOCK)
        acc, largest, total = _attend(
            acc, largest, total, block, k_rows, v_rows, k_start, k_token, v_token, keys, query, offset, window, scale,
            softcap, d, whole, rest, rest, 0, False, CAUSAL, WINDOW, SOFTCAP, D, WIDTH, BLOCK,
        )  # fmt: skip
        acc, largest, total = _attend(
            acc, largest, total, block, k_rows, v_rows, k_start, k_token, v_token, keys, query, offset, window, scale,
            softcap, d, begin, end, whole, rest - whole, True, CAUSAL, WINDOW, SOFTCAP, D, WIDTH, BLOCK,
        )  # fmt: skip
        blind = total == 0.0
        acc = acc * (1.0 / tl.where(blind, 1.0, total))[:, None]
        inside = query < queries
        at = ((q_start + query) * HEADS + head) * D
        mask = inside[:, None] & (d < D)[None, :]
        tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
        natural = (largest + tl.math.log2(tl.where(blind, 1.0, total))) * LN2
        natural = tl.where(blind, -float("inf"), natural)
        tl.store(lse + head * query_tokens + q_start + query, natural, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, dout, dlse, lse, delta, tokens, out_token, out_head, dout_token, dout_head,
    DLSE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """delta [heads, tokens] = rowsum(out * dout) - dlse; a program for OWN tokens of a head."""
    start = tl.program_id(0).to(tl.int64) * OWN
    token = start + tl.arange(0, OWN)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, WIDTH)
    o = _load_rows(_rows(out + head * out_head, start, out_token, d, OWN), token, tokens, d, True, D, WIDTH)
    g = _load_rows(_rows(dout + head * dout_head, start, dout_token, d, OWN), token, tokens, d, True, D, WIDTH)
    o = o.to(tl.float32)
    g = g.to(tl.float32)
    total = tl.sum(o * g, 1)
    at = head * tokens + token
    if DLSE:
        # Merging two lse of -inf sends NaN back, as logaddexp does: it must not reach 0 * NaN.
        blind = tl.load(lse + at, mask=token < tokens, other=0.0) == -float("inf")
        total = tl.where(blind, 0.0, total - tl.load(dlse + at, mask=token < tokens, other=0.0))
    tl.store(delta + at, total, mask=token < tokens)


@triton.jit
def _statistics(lse, delta, at, query, queries):
    """lse in base 2, +inf where a query sees nothing or is none, so that its probabilities are 0; and delta."""
    natural = tl.load(lse + at + query, mask=query < queries, other=-float("inf"))
    d = tl.load(delta + at + query, mask=query < queries, other=0.0)
    return tl.where(natural == -float("inf"), float("inf"), natural * LOG2E), d


@triton.jit
def _gather_dkdv(
    dk, dv, keys_block, values_block, q, dout, lse, delta, q_start, q_stride, dout_stride, queries, keys, key, offset,
    window, scale, softcap, d, begin, end, split, gap, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks the query blocks of [begin, split) and [split + gap, end).

    Scores are transposed, so that p and ds are left operands. Queries past the end need no mask: their lse makes their
    probabilities 0.
    """
    q_rows = _rows(q, q_start, q_stride, d, BLOCK)
    dout_rows = _rows(dout, q_start, dout_stride, d, BLOCK)
    for step in range(begin, end - gap, BLOCK):
        first = step + tl.where(step >= split, gap, 0)
        query = first + tl.arange(0, BLOCK)
        q_block = _load_rows(q_rows + tl.cast(first, tl.int64) * q_stride, query, queries, d, True, D, WIDTH)
        s = _products(keys_block, q_block)
        s, slope = _exponent(s, scale, softcap, SOFTCAP)
        row_lse, row_delta = _statistics(lse, delta, q_start, query, queries)
        p = tl.math.exp2(s - row_lse[None, :])
        if MASKED:
            p = tl.where(_seen(query[None, :], key[:, None], offset, keys, window, CAUSAL, WINDOW), p, 0.0)
        pointers = dout_rows + tl.cast(first, tl.int64) * dout_stride
        dout_block = _load_rows(pointers, query, queries, d, True, D, WIDTH)
        dv = tl.dot(p.to(dout_block.dtype), dout_block, dv, input_precision="ieee")
        dp = _products(values_block, dout_block)
        ds = p * (dp - row_delta[None, :])
        if SOFTCAP:
            ds *= slope
        dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["documents", "query_tokens", "key_tokens"])
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens, cu_seqlens_k, documents, query_tokens, key_tokens, scale, softcap,
    window, q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a tile of keys and one of HEADS key heads. The first tiles are seen by the most queries."""
    kv_head = tl.program_id(1).to(tl.int64)
    k_start, keys, q_start, queries, first = _place(
        cu_seqlens_k, cu_seqlens, documents, key_tokens, query_tokens, tl.program_id(0), OWN
    )  # fmt: skip
    if first < keys:
        key = first + tl.arange(0, OWN)
        d = tl.arange(0, WIDTH)
        pointers = _rows(k + kv_head * k_head, k_start + first, k_token, d, OWN)
        keys_block = _load_rows(pointers, key, keys, d, True, D, WIDTH)
        pointers = _rows(v + kv_head * v_head, k_start + first, v_token, d, OWN)
        values_block = _load_rows(pointers, key, keys, d, True, D, WIDTH)
        acc_k = tl.zeros([OWN, WIDTH], tl.float32)
        acc_v = tl.zeros([OWN, WIDTH], tl.float32)
        offset = keys - queries
        # Queries [begin, whole) and [rest, end) see some of the keys, those between see all. All but the end are
        # multiples of BLOCK. Heads of 256 leave no registers for a second walk: the first one then masks all blocks.
        ONE_WALK: tl.constexpr = CAUSAL and WIDTH > 128
        begin = 0
        whole = 0
        rest = queries
        end = queries
        if CAUSAL:
            begin = tl.maximum(0, first - offset) // BLOCK * BLOCK
            last = tl.minimum(first + OWN, keys) - 1
            whole = tl.maximum(begin, tl.maximum(0, last - offset + BLOCK - 1) // BLOCK * BLOCK)
            if WINDOW:
                end = tl.maximum(begin, tl.minimum(queries, last + window - offset))
                rest = tl.maximum(begin, tl.minimum(end, tl.maximum(0, first + window - offset)) // BLOCK * BLOCK)
                whole = tl.minimum(whole, rest)
        if ONE_WALK:
            rest = whole
        # Where no query sees all of the keys, rest - whole may be negative: then nothing is walked without a mask, and
        # the masked walk never comes to its gap.
        for member in range(0, GROUP):
            head = kv_head * GROUP + member
            q_rows = q + head * q_head
            dout_rows = dout + head * dout_head
            row_lse = lse + head * query_tokens
            row_delta = delta + head * query_tokens
            if CAUSAL:
                acc_k, acc_v = _gather_dkdv(
                    acc_k, acc_v, keys_block, values_block, q_rows, dout_rows, row_lse, row_delta, q_start, q_token,
                    dout_token, queries, keys, key, offset, window, scale, softcap, d, begin, end, whole, rest - whole,
                    True, CAUSAL, WINDOW, SOFTCAP, D, WIDTH, BLOCK,
                )  # fmt: skip
            if not ONE_WALK:
                acc_k, acc_v = _gather_dkdv(
                    acc_k, acc_v, keys_block, values_block, q_rows, dout_rows, row_lse, row_delta, q_start, q_token,
                    dout_token, queries, keys, key, offset, window, scale, softcap, d, whole, rest, rest, 0, False,
                    CAUSAL, WINDOW, SOFTCAP, D, WIDTH, BLOCK,
                )  # fmt: skip
        at = ((k_start + key) * HEADS + kv_head)[:, None] * D + d[None, :]
        mask = (key < keys)[:, None] & (d < D)[None, :]
        tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def _gather_dq(
    dq, queries_block, dout_block, row_lse, row_delta, k, v, k_start, k_stride, v_stride, keys, query, offset, window,
    scale, softcap, d, begin, end, split, gap, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks the key blocks of [begin, split) and [split + gap, end)."""
    k_rows = _rows(k, k_start, k_stride, d, BLOCK)
    v_rows = _rows(v, k_start, v_stride, d, BLOCK)
    for step in range(begin, end - gap, BLOCK):
        first = step + tl.where(step >= split, gap, 0)
        key = first + tl.arange(0, BLOCK)
        k_block = _load_rows(k_rows + tl.cast(first, tl.int64) * k_stride, key, keys, d, MASKED, D, WIDTH)
        s = _products(queries_block, k_block)
        s, slope = _exponent(s, scale, softcap, SOFTCAP)
        p = tl.math.exp2(s - row_lse[:, None])
        if MASKED:
            p = tl.where(_seen(query[:, None], key[None, :], offset, keys, window, CAUSAL, WINDOW), p, 0.0)
        v_block = _load_rows(v_rows + tl.cast(first, tl.int64) * v_stride, key, keys, d, MASKED, D, WIDTH)
        ds = p * (_products(dout_block, v_block) - row_delta[:, None])
        if SOFTCAP:
            ds *= slope
        dq = tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["documents", "query_tokens", "key_tokens"])
def dq_kernel(
    q, k, v, dout, lse, delta, dq, cu_seqlens, cu_seqlens_k, documents, query_tokens, key_tokens, scale, softcap,
    window, q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a tile of queries and one of HEADS query heads, the last tiles first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_start, queries, k_start, keys, first = _place(
        cu_seqlens, cu_seqlens_k, documents, query_tokens, key_tokens, tile, OWN
    )  # fmt: skip
    if first < queries:
        query = first + tl.arange(0, OWN)
        d = tl.arange(0, WIDTH)
        pointers = _rows(q + head * q_head, q_start + first, q_token, d, OWN)
        queries_block = _load_rows(pointers, query, queries, d, True, D, WIDTH)
        pointers = _rows(dout + head * dout_head, q_start + first, dout_token, d, OWN)
        dout_block = _load_rows(pointers, query, queries, d, True, D, WIDTH)
        at = head * query_tokens
        row_lse, row_delta = _statistics(lse + at, delta + at, q_start, query, queries)
        acc = tl.zeros([OWN, WIDTH], tl.float32)
        k_rows = k + head // GROUP * k_head
        v_rows = v + head // GROUP * v_head
        offset = keys - queries
        begin, whole, rest, end = _key_ranges(first, queries, keys, window, CAUSAL, WINDOW, OWN, BLOCK)
        acc = _gather_dq(
            acc, queries_block, dout_block, row_lse, row_delta, k_rows, v_rows, k_start, k_token, v_token, keys, query,
            offset, window, scale, softcap, d, whole, rest, rest, 0, False, CAUSAL, WINDOW, SOFTCAP, D, WIDTH, BLOCK,
        )  # fmt: skip
        acc = _gather_dq(
            acc, queries_block, dout_block, row_lse, row_delta, k_rows, v_rows, k_start, k_token, v_token, keys, query,
            offset, window, scale, softcap, d, begin, end, whole, rest - whole, True, CAUSAL, WINDOW, SOFTCAP, D,
            WIDTH, BLOCK,
        )  # fmt: skip
        mask = (query < queries)[:, None] & (d < D)[None, :]
        out = ((q_start + query) * HEADS + head)[:, None] * D + d[None, :]
        tl.store(dq + out, (acc * scale).to(dq.dtype.element_ty), mask=mask)


# ---- launches --------------------------------------------------------------------------------------------------------


def _constants(q: Tensor, k: Tensor, options: Options, tile: Tile, heads: int) -> dict[str, int | bool]:
    limit = {"maxnreg": tile.registers} if tile.registers and not architecture(q).startswith("gfx") else {}
    return limit | {
        "HEADS": heads,
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "WIDTH": max(16, next_power_of_2(q.shape[2])),
        "CAUSAL": options.causal,
        "WINDOW": options.causal and options.window > 0,
        "SOFTCAP": options.softcap != 0.0,
        "OWN": tile.own,
        "BLOCK": tile.walked,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _tiles(tokens: int, documents: int, own: int) -> int:
    """Tiles of so many tokens in so many documents, and of the tail: at most this many."""
    return tokens // own + documents + 1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
    measured: MeasuredTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of documents.

    Args:
        q: ``[T, Hq, D]``, the last dimension contiguous, as in all below; 1 <= D <= 256.
        k: ``[S, Hk, D]``.
        v: ``[S, Hk, D]``.
        cu_seqlens: ``[N + 1]`` int32, contiguous.
        cu_seqlens_k: as `cu_seqlens`.
        options: causal, window, softcap, scale.
        measured: tiles for `tiles_for`.

    Returns:
        out ``[T, Hq, D]``, contiguous, and lse ``[Hq, T]`` float32, -inf for a query that sees nothing.
    """
    options = _without_idle_window(options, k.shape[0])
    tokens, heads, _ = q.shape
    documents = cu_seqlens.numel() - 1
    out, lse = q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)
    tile = tiles_for(q, options, measured).forward
    if q.numel():
        with on_device_of(q):
            forward_kernel[(_tiles(tokens, documents, tile.own), heads)](
                q, k, v, out, lse, cu_seqlens, cu_seqlens_k, documents, tokens, k.shape[0], options.scale,
                options.softcap, options.window, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                **_constants(q, k, options, tile, heads),
            )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
    measured: MeasuredTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous.

    Args:
        dout: ``[T, Hq, D]``, the last dimension contiguous.
        dlse: ``[Hq, T]`` float32, contiguous, or None.
        q: as in `forward`, as are k, v, cu_seqlens, cu_seqlens_k and options.
        k: ``[S, Hk, D]``.
        v: ``[S, Hk, D]``.
        out: the forward's.
        lse: the forward's, contiguous.
        cu_seqlens: ``[N + 1]`` int32.
        cu_seqlens_k: ``[N + 1]`` int32.
        options: causal, window, softcap, scale.
        measured: tiles for `tiles_for`.
    """
    options = _without_idle_window(options, k.shape[0])
    tokens, heads, head_dim = q.shape
    key_tokens, kv_heads, _ = k.shape
    documents = cu_seqlens.numel() - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = lse.new_empty(lse.shape)
    tiles, width = tiles_for(q, options, measured), max(16, next_power_of_2(head_dim))
    shared = (cu_seqlens, cu_seqlens_k, documents, tokens, key_tokens, options.scale, options.softcap, options.window)
    strides = tuple(stride for x in (q, k, v, dout) for stride in x.stride()[:2])
    with on_device_of(q):
        if q.numel():
            rows = 2048 // width
            delta_kernel[(triton.cdiv(tokens, rows), heads)](
                out, dout, lse if dlse is None else dlse, lse, delta, tokens, *out.stride()[:2], *dout.stride()[:2],
                DLSE=dlse is not None, D=head_dim, WIDTH=width, OWN=rows, num_warps=4,
            )  # fmt: skip
            dq_kernel[(_tiles(tokens, documents, tiles.dq.own), heads)](
                q, k, v, dout, lse, delta, dq, *shared, *strides, **_constants(q, k, options, tiles.dq, heads)
            )  # fmt: skip
        if k.numel():
            dkdv_kernel[(_tiles(key_tokens, documents, tiles.dkdv.own), kv_heads)](
                q, k, v, dout, lse, delta, dk, dv, *shared, *strides,
                **_constants(q, k, options, tiles.dkdv, kv_heads),
            )  # fmt: skip
    return dq, dk, dv
