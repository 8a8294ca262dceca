"""Weights in the layouts that kernels read: rows that can be skipped, contiguous, padded to whole cache lines.

    skip="outputs"   rows are outputs, W [out, in]     gate and up projections of a gated FFN
    skip="inputs"    rows are inputs,  W^T [in, out]   the down projection, and any linear layer with dropped inputs

With stripe=n, for skip="inputs", every n outputs lie together as a matrix W^T [in, n] of their own: what a stripe keeps of its
inputs by its own rule (granular sparsity, as in CWIC) is then read from one piece of memory.

A linear layer is packed once, in the layout that its site needs: no second copy is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsity_lib.checks import count
from sparsity_lib.errors import SparsityError, refuse, unknown

#: Formats by the names of `pack`, with the C++ side's numbers, entries of a 64-byte line, and bits an entry.
#: The C++ side has no float16: there, plain PyTorch multiplies it.
FORMATS = {"float32": (0, 16, 32), "bfloat16": (1, 32, 16), "int8": (2, 64, 8), "int4": (3, 128, 4), "float16": (None, 32, 16)}
SKIPS = ("inputs", "outputs")
GROUPS = (32, 128)


@dataclass(frozen=True)
class Packed:
    """A packed weight matrix; make it with `pack`.

    data: [rows, padded] float32, bfloat16, float16 or int8, or [rows, padded / 8] int32 of eight nibbles each; rows may lie
    further apart than they are long (see `pair`). With a stripe, [stripes * rows, padded], padded being a stripe's.
    scales: int8 [out], one an output; int4 [rows, padded / group] bfloat16, one for `group` entries along a row.
    """

    data: Tensor
    scales: Tensor | None
    rows: int
    cols: int
    padded: int
    format: str
    group: int
    skip: str
    stripe: int = 0

    def __post_init__(self) -> None:
        # Kernels follow its pointers: what does not fit together must not come to be.
        numbers = (self.rows, self.cols, self.padded, self.group, self.stripe)
        typed = all(type(number) is int and number >= 0 for number in numbers)
        typed = typed and isinstance(self.format, str) and isinstance(self.skip, str)
        typed = typed and isinstance(self.data, Tensor) and isinstance(self.scales, Tensor | None)
        if not (typed and self.format in FORMATS and self.skip in SKIPS and self.group in GROUPS):
            raise refuse("packed weight", (self.format, self.skip, *numbers), "what ops.pack returns")
        _, line, bits = FORMATS[self.format]
        data, rows, cols, padded = self.data, self.rows * self.stripes, self.stripe or self.cols, self.padded
        outputs = self.cols if self.skip == "inputs" else rows
        scales = {"int8": outputs, "int4": rows * padded // self.group}.get(self.format, 0)
        size = data.numel() * data.element_size()
        whole = padded % line == 0 and cols <= padded < cols + line and size == rows * padded * bits // 8
        in_rows = data.dim() == 2 and len(data) == rows and data.stride(1) == 1 and data.stride(0) >= data.shape[1]
        dense_scales = self.scales is None or self.scales.is_contiguous()
        if not (whole and in_rows and dense_scales and (0 if self.scales is None else self.scales.numel()) == scales):
            raise refuse("packed weight", f"{tuple(data.shape)} for {rows} x {cols}", "what ops.pack returns")

    @property
    def inputs(self) -> int:
        return self.rows if self.skip == "inputs" else self.cols

    @property
    def outputs(self) -> int:
        return self.cols if self.skip == "inputs" else self.rows

    @property
    def stripes(self) -> int:
        """Stripes of outputs that lie apart; the last may be narrower than the others, and is padded."""
        return -(-self.cols // self.stripe) if self.stripe else 1

    @property
    def stride(self) -> int:
        """Entries from one row to the next."""
        return self.data.stride(0) * (8 if self.format == "int4" else 1)

    @property
    def bytes(self) -> int:
        """Memory of data and scales, padding included."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def row_bytes(self) -> float:
        """Bytes read for one row: what skipping it saves."""
        per_row = 0 if self.scales is None or self.format == "int8" else self.scales.nbytes / self.rows
        return self.data.nbytes / self.rows + per_row

    def dense(self) -> Tensor:
        """The matrix as stored, back in float32 [out, in]: what every backend's numbers are compared with."""
        if self.format == "int4":
            values = _unpack_int4(self.data).view(len(self.data), -1, self.group).float() * self.scales.float()[..., None]
            found = values.view(len(self.data), self.padded)
        else:
            found = self.data.float()
        if self.stripe:  # side by side again
            found = found.view(self.stripes, self.rows, self.padded)[..., : self.stripe].transpose(0, 1).reshape(self.rows, -1)
        found = found[:, : self.cols]
        if self.format == "int8":
            found = found * (self.scales if self.skip == "inputs" else self.scales[:, None])
        return (found.T if self.skip == "inputs" else found).contiguous()


def pack(weight: Tensor, skip: str, format: str | None = None, group: int = 32, stripe: int | None = None) -> Packed:
    """Pack a weight matrix [out, in].

    Parameters
    ----------
    skip
        What will be skipped: "inputs" or "outputs" (see the module).
    format
        "float32", "bfloat16", "float16", "int8" (symmetric, one scale an output) or "int4" (symmetric, -8 to 7, one
        bfloat16 scale for `group` entries along the stored rows); by default the weight's own.
    group
        32 or 128 entries a scale, int4 only.
    stripe
        Outputs that get a rule of their own, with skip="inputs"; the last stripe takes what is left. Any number: each stripe's
        rows are padded to whole cache lines (16 float32 or 128 int4 entries), so few outputs waste some of what is read.

    Raises
    ------
    SparsityError
        If the weight is no finite matrix, too large for the format, or a name or number is none of the above.
    """
    format = str(weight.dtype).removeprefix("torch.") if format is None else format
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if skip not in SKIPS:
        raise unknown("skip", skip, SKIPS)
    if group not in GROUPS or isinstance(group, bool):
        raise refuse("group", group, f"one of {GROUPS}")
    if weight.dim() != 2 or not weight.numel() or not weight.is_floating_point():
        raise refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", "a floating-point matrix [out, in], not empty")
    if not weight.isfinite().all():
        raise SparsityError("The weight holds NaN or infinity, which no kernel may skip. Fix: repair the model.")
    if stripe is not None and (skip != "inputs" or count("stripe", stripe) > len(weight)):
        raise refuse("stripe", stripe, f"at most the {len(weight)} outputs of a weight packed with skip='inputs'")
    line = FORMATS[format][1]
    stored = (weight.T if skip == "inputs" else weight).detach()
    rows, cols = stored.shape
    padded = -(-(stripe or cols) // line) * line
    shape = {"rows": rows, "cols": cols, "padded": padded, "format": format, "group": group, "skip": skip, "stripe": stripe or 0}
    if format == "int8":
        scales = (weight.detach().float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = stored.float() / (scales if skip == "inputs" else scales[:, None])
        stored = scaled.round().clamp(-127, 127).to(torch.int8)
    if stripe:  # one stripe below the other
        whole = torch.nn.functional.pad(stored, (0, -cols % stripe)).view(rows, -1, stripe)
        stored = whole.transpose(0, 1).reshape(-1, stripe)
    rows, cols = stored.shape
    if format in ("float32", "bfloat16", "float16"):
        data = _buffer((rows, padded), getattr(torch, format), weight.device)
        data[:, :cols] = stored
        if data.dtype != weight.dtype and not data.isfinite().all():
            raise refuse("weight", float(weight.abs().max()), f"numbers that {format} can hold", "choose another format")
        return Packed(data, None, **shape)
    if format == "int8":
        data = _buffer((rows, padded), torch.int8, weight.device)
        data[:, :cols] = stored
        return Packed(data, scales.contiguous(), **shape)
    wide = torch.nn.functional.pad(stored.float(), (0, padded - cols)).view(rows, -1, group)
    extreme = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))  # the largest by size becomes -8, the range's long end
    scales = (extreme / -8).to(torch.bfloat16)
    step = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    levels = (wide / step).round().clamp(-8, 7).to(torch.int32).view(rows, padded)
    data = _buffer((rows, padded // 8), torch.int32, weight.device)
    data.copy_(_pack_int4(levels))
    return Packed(data, scales[..., 0].contiguous(), **shape)


def pair(up: Packed, down: Packed) -> tuple[Packed, Packed]:
    """The same two matrices with their rows in turn: row j of `up`, row j of `down`, row j + 1 of `up`, ...

    A gated FFN that keeps neuron j reads both rows j. Side by side they are one piece of memory, half as many jumps.

    Raises
    ------
    SparsityError
        If the two differ in rows or format, or lie in stripes.
    """
    if up.stripe or down.stripe:
        raise refuse("stripe", up.stripe or down.stripe, "none: rows that lie in several pieces have no neighbours")
    for name, one, other in (("rows", up.rows, down.rows), ("format", (up.format, up.group), (down.format, down.group))):
        if one != other:
            raise refuse(f"{name} of down", other, f"{one}, as up has")
    width = up.data.shape[1]
    both = _buffer((up.rows, width + down.data.shape[1]), up.data.dtype, up.data.device)
    both[:, :width], both[:, width:] = up.data, down.data
    return replace(up, data=both[:, :width]), replace(down, data=both[:, width:])


def _buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose rows start on a cache line; large ones on huge pages, where skipping rows would tax the TLB."""
    from sparsity_lib.ops import memory

    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def _pack_int4(levels: Tensor) -> Tensor:
    """Levels [rows, padded] in [-8, 7] -> dwords [rows, padded / 8]: entry 16 k + l of 128 is nibble k of dword l."""
    lanes = (levels + 8).view(len(levels), -1, 8, 16)
    words = torch.zeros(len(levels), lanes.shape[1], 16, dtype=torch.int64, device=levels.device)
    for k in range(8):
        words |= lanes[:, :, k].long() << (4 * k)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(len(levels), -1)


def _unpack_int4(data: Tensor) -> Tensor:
    """The inverse of `_pack_int4`."""
    words = data.view(len(data), -1, 16)
    return torch.stack([(words >> (4 * k)) & 15 for k in range(8)], 2).reshape(len(data), -1) - 8
