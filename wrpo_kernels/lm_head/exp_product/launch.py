"""How the kernels of `product` and `repair` are launched: what they are given, their tiles and grids."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wrpo_kernels.dispatch.triton_backend import multiprocessors
from wrpo_kernels.lm_head.exp_product import form, product, repair
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.triton_kernel import check_labels_where_free, factors

ROWS, TILES = 32, 64  # of the partial sums that a program adds up at a time
COLUMNS = 1024  # of a hidden state, in the dot product of a label; and rows, in the product of their coefficients
CUTS = 16  # programs that share the vocabulary of a block of rows in a repair
SUM_BYTES = 64 << 20  # of partial sums where no powers are stored beside them
LOG2E = math.log2(math.e)


class Operands(NamedTuple):
    """What is multiplied; the last dimension of each is contiguous."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    low: Tensor | None = None  # [N, r] of an adapter
    up: Tensor | None = None  # [V, r]

    def rows(self, first: int, last: int) -> Operands:
        return self._replace(hidden=self.hidden[first:last], low=None if self.low is None else self.low[first:last])

    @property
    def sizes(self) -> tuple[int, ...]:
        """V, D, r, and the strides of rows."""
        present = [self.weight if x is None else x for x in self]
        return *self.weight.shape, present[2].shape[1], *[x.stride(0) for x in present]


class Tiles(NamedTuple):
    """Of one architecture; `form.table` holds them."""

    shape: dict[str, int]
    programs: int  # a multiprocessor
    has_descriptors: bool


def logp_of_hidden(
    operands: tuple[Tensor | None, ...], target: Tensor, ignore_index: int, transform: LogitTransform, logp: Tensor
) -> None:
    """Writes `logp` [N]; a label out of range gives NaN on a GPU. No logits are stored: sums of tiles alone are."""
    operands = in_rows(operands)
    check_labels_where_free(operands.weight, target, ignore_index, len(operands.weight))
    step = max(1, SUM_BYTES // (4 * triton.cdiv(len(operands.weight), tiles_for(operands.hidden).shape["BLOCK_V"])))
    for first in range(0, len(target), step):
        last = min(first + step, len(target))
        part = operands.rows(first, last)
        Problem(part, target[first:last], ignore_index, transform, logp[first:last]).run(None)


def delta_of_hidden(
    operands: tuple[Tensor | None, ...],
    target: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    logp: Tensor,
    out: Tensor,
) -> None:
    """The same, and leaves in `out` [N, V] bfloat16 what `coefficients` make the delta."""
    operands = in_rows(operands)
    check_labels_where_free(operands.weight, target, ignore_index, len(operands.weight))
    if len(target):
        Problem(operands, target, ignore_index, transform, logp).run(out)


def coefficients(coef: Tensor, logp: Tensor, slope: float) -> Tensor:
    """[N, 1] float32, what the rows of `out` are to be multiplied by for `coef` [N, 1] times their delta."""
    out = torch.empty_like(logp)
    if len(out):
        with torch.cuda.device_of(out):
            product._row_coefficients_fwd[(triton.cdiv(len(out), COLUMNS),)](
                *(coef, logp.contiguous(), out, len(out), coef.stride(0), slope),
                ROWS=COLUMNS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out[:, None]


def in_rows(operands: tuple[Tensor | None, ...]) -> Operands:
    return Operands(*[x if x is None or x.stride(1) == 1 else x.contiguous() for x in operands])


def tiles_for(tensor: Tensor) -> Tiles:
    row = form.row_of(form.architecture(tensor.device))
    return Tiles(row["tiles"], row["programs"], row["has_descriptors"])


class Problem:
    """One call of the kernels: sizes, tiles and scratch of these operands."""

    def __init__(
        self,
        operands: Operands,
        target: Tensor,
        ignore_index: int,
        transform: LogitTransform,
        logp: Tensor,
        tiles: Tiles | None = None,
    ) -> None:
        self.operands, self.target, self.ignore_index, self.logp = operands, target, ignore_index, logp
        self.tiles = tiles or tiles_for(operands.hidden)
        self.number, self.vocabulary = len(target), len(operands.weight)
        self.bias = None if transform.bias is None else transform.bias.contiguous()
        self.flags = {
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": transform.softcap > 0,
            "HAS_ADAPTER": operands.up is not None,
        }
        self.factors = _factors_in_bits(transform)
        self.shape = {**self.tiles.shape, "enable_fp_fusion": True}
        self.walk = {name: self.shape.pop(name) for name in ("GROUP", "SPLIT", "FLATTEN")}
        if operands.up is not None:  # a second loop over the columns, which is not flattened with the first
            self.walk["FLATTEN"] = 0
        if transform.softcap:  # its bend is as large as the tile: with 4 warps it spills
            self.shape["num_warps"] = 8
        self.across = triton.cdiv(self.vocabulary, self.shape["BLOCK_V"])
        self.score, self.bend, self.lse = logp.new_empty(3, self.number)
        self.sums = logp.new_empty(2, self.across, self.number)

    def run(self, out: Tensor | None) -> None:
        with torch.cuda.device_of(self.target):
            self.score_labels()
            self.multiply(out)
            self.finish(out)
            self.repair(out)

    def score_labels(self) -> None:
        given = (*self.operands, self.bias, self.target, self.score, self.bend)
        walk = {"BLOCK": COLUMNS, "num_warps": 4, "enable_fp_fusion": True}
        product._label_score_fwd[(self.number,)](*given, *self.operands.sizes, *self.factors, **self.flags, **walk)

    def multiply(self, out: Tensor | None) -> None:
        given, stored, described = self._as_the_device_reads(self.shape["BLOCK_N"], out)
        down = triton.cdiv(self.number, self.shape["BLOCK_N"])
        programs = min(down * self.across, self.tiles.programs * _processors(self.target))
        product._exp_product_fwd[(programs,)](
            *(*given, self.bias, self.target, self.score, stored, self.sums[0], self.number),
            *(*self.operands.sizes, _stride(out), *self.factors),
            **self.flags, **self.shape, **self.walk, **described, STORES=out is not None,
        )  # fmt: skip

    def finish(self, out: Tensor | None) -> None:
        product._exp_finish_fwd[(triton.cdiv(self.number, ROWS),)](
            *(self.sums[0], self.score, self.bend, self.target, out, self.logp),
            *(self.number, self.vocabulary, self.across, _stride(out), self.ignore_index),
            STORES=out is not None, ROWS=ROWS, TILES=TILES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    def repair(self, out: Tensor | None) -> None:
        # Fewer values a thread than in the product, for they have places too: 64 rows, 32 where no descriptor knows
        # those of the operands.
        height = self.shape["BLOCK_N"] // (2 if self.tiles.has_descriptors else 4)
        given, _, described = self._as_the_device_reads(height, None)
        walk = {**self.flags, **self.shape, **described, "BLOCK_N": height, "num_warps": 4}
        grid = (triton.cdiv(self.number, height), min(CUTS, self.across))
        sizes = (self.number, *self.operands.sizes)
        repair._exp_repair_sums_fwd[grid](*given, self.bias, self.logp, *self.sums, *sizes, *self.factors, **walk)
        repair._exp_repair_merge_fwd[(triton.cdiv(self.number, ROWS),)](
            *(*self.sums, self.score, self.logp, self.lse, self.number, self.across),
            ROWS=ROWS, TILES=TILES, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if out is not None:
            rows = (self.target, self.bend, self.logp, self.lse)
            repair._exp_repair_store_fwd[grid](
                *given, self.bias, *rows, out, *sizes, _stride(out), *self.factors, **walk
            )

    def _as_the_device_reads(self, height: int, out: Tensor | None) -> tuple[list[Any], Any, dict[str, bool]]:
        """Operands and output as descriptors of their tiles, `height` rows of hidden states each, or as they are."""
        present = [x for x in (*self.operands, out) if x is not None]
        if not (self.tiles.has_descriptors and all(_has_descriptor(x) for x in present)):
            return [*self.operands], out, {"DESCRIPTORS": False}
        heights = (height, self.shape["BLOCK_V"]) * 2
        given = [
            None if x is None else _descriptor(x, rows, self.shape["BLOCK_K"])
            for x, rows in zip(self.operands, heights, strict=True)
        ]
        stored = None if out is None else _descriptor(out, height, self.shape["BLOCK_V"] // self.walk["SPLIT"])
        return given, stored, {"DESCRIPTORS": True}


def _factors_in_bits(transform: LogitTransform) -> tuple[float, float]:
    """`scale` and `cap` of `triton_math.transformed`, for scores times log2(e)."""
    scale, cap, _ = factors(transform)
    return (scale, cap * LOG2E) if transform.softcap else (scale * LOG2E, 0.0)


def _processors(tensor: Tensor) -> int:
    return multiprocessors(tensor.device.index) if tensor.is_cuda else 2


def _has_descriptor(x: Tensor) -> bool:
    """The unit that copies tiles takes addresses and rows that are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, [*x.shape], [x.stride(0), 1], [rows, columns])


def _stride(out: Tensor | None) -> int:
    return 0 if out is None else out.stride(0)
