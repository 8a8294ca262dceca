"""Tiles of packed weights, in every stored format, as Triton values."""

import triton
import triton.language as tl

#: Entries of one int4 line: 16 dwords of eight nibbles, entry 16 k + l being nibble k of dword l.
LINE: tl.constexpr = tl.constexpr(128)


@triton.jit
def load_tile(data, scales, rows, live, start, padded, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Entries [ROWS, COLS] of packed rows from column `start` on; rows that are not live are not read, and count as 0.

    float32, bfloat16, float16 and int8 come as stored (GROUP = 0; int8's scale waits for the sum), int4 as scaled float32.
    """
    if GROUP == 0:
        cols = start + tl.arange(0, COLS)
        place = rows.to(tl.int64)[:, None] * padded + cols[None, :]
        return tl.load(data + place, mask=live[:, None] & (cols < padded)[None, :], other=0)
    else:
        return _load_int4(data, scales, rows, live, start, padded, GROUP, ROWS, COLS)


@triton.jit
def _load_int4(data, scales, rows, live, start, padded, GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    lines = start // LINE + tl.arange(0, COLS // LINE)
    here = live[:, None] & (lines * LINE < padded)[None, :]
    row = rows.to(tl.int64)
    dword = lines[:, None] * 16 + tl.arange(0, 16)[None, :]
    words = tl.load(data + row[:, None, None] * (padded // 8) + dword[None, :, :], mask=here[:, :, None], other=0)
    nibble = tl.arange(0, 8)
    levels = ((words[:, :, None, :] >> (4 * nibble)[None, None, :, None]) & 15) - 8
    if GROUP == LINE:
        scale = tl.load(scales + row[:, None] * (padded // GROUP) + lines[None, :], mask=here, other=0).to(tl.float32)
        tile = levels.to(tl.float32) * scale[:, :, None, None]
    else:
        group = lines[:, None] * (LINE // GROUP) + ((nibble * 16) // GROUP)[None, :]
        place = row[:, None, None] * (padded // GROUP) + group[None, :, :]
        scale = tl.load(scales + place, mask=here[:, :, None], other=0).to(tl.float32)
        tile = levels.to(tl.float32) * scale[:, :, :, None]
    return tl.reshape(tile, (ROWS, COLS))
