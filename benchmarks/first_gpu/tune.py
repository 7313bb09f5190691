"""python -m benchmarks.first_gpu.tune --out FOLDER: which shapes and sizes are fast on this card.

    exp      the product that leaves powers, in every shape of SHAPES, beside the library's h W^T
    library  the three products of torch at multiples of 128 rows; dW also in float32; dh and dW also with sums that may
             be reduced in bfloat16
    cast     the float32 dW, scaled and rounded, beside a copy
    rows     the row pass of each backend, beside a copy

tuning.csv has every figure. tuned/<architecture>.json holds the row of `exp_product/devices.json` for this card,
written again after each shape, so that a run that is stopped leaves the best so far.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.first_gpu.heads import BF16, Head, Run, milliseconds, read_arguments
from benchmarks.first_gpu.steps import headline
from benchmarks.gpu import PLAIN, kernels
from wrpo_kernels.environment import default_budget
from wrpo_kernels.linear_preference_loss.contract import scaled_to
from wrpo_kernels.lm_head.budget import rows_within
from wrpo_kernels.lm_head.exp_product import form

BUSY_MS = 3.0
MOST_ROWS = 4096


class Figure(NamedTuple):
    part: str
    head: str
    what: str
    rows: int
    ms: float
    rate: float
    unit: str


def shape(
    n: int, v: int, k: int, warps: int, stages: int, split: int, group: int = 8, flatten: int = 0
) -> dict[str, int]:
    """`flatten`: the loads of the next tile begin before the epilogue of the last has ended."""
    tiles = {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_K": k, "GROUP": group, "SPLIT": split, "FLATTEN": flatten}
    return tiles | {"num_warps": warps, "num_stages": stages}


# Tiles, and programs a multiprocessor. Two share one so that the epilogue of one runs beside the product of the other.
SHAPES = (
    (shape(128, 128, 64, 4, 3, 2), 2),
    (shape(128, 256, 64, 8, 4, 2, flatten=1), 1),
    (shape(128, 128, 64, 4, 3, 2, flatten=1), 2),
    (shape(256, 128, 64, 8, 3, 2, flatten=1), 1),
    (shape(128, 256, 64, 8, 3, 2), 1),
    (shape(128, 128, 64, 8, 4, 1, flatten=1), 1),
    (shape(128, 128, 64, 4, 3, 2, group=16), 2),
    (shape(64, 256, 64, 4, 3, 2), 1),
    (shape(128, 128, 128, 8, 3, 2), 1),
)
TOY_SHAPES = ((shape(32, 64, 32, 4, 1, 2), 1), (shape(64, 32, 32, 4, 1, 1, flatten=1), 1))


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor
    target: Tensor
    out: Tensor  # [n, V]


def operands(head: Head, rows: int, device: str) -> Operands:
    hidden = torch.randn(rows, head.width, device=device).to(BF16)
    weight = (torch.randn(head.vocabulary, head.width, device=device) / head.width**0.5).to(BF16)
    target = torch.randint(0, head.vocabulary, (rows,), device=device)
    return Operands(hidden, weight, target, torch.empty(rows, head.vocabulary, dtype=BF16, device=device))


def exp_product(given: Operands, tiles: dict[str, int], programs: int) -> Callable[[], object]:
    """The product alone, its labels' scores made before."""
    from wrpo_kernels.lm_head.exp_product import launch

    has_descriptors = form.row_of(form.architecture(given.hidden.device))["has_descriptors"]
    logp = torch.empty(len(given.target), device=given.hidden.device)
    chosen = launch.Tiles(tiles, programs, has_descriptors)
    problem = launch.Problem(launch.Operands(given.hidden, given.weight), given.target, -100, PLAIN, logp, chosen)
    problem.score_labels()
    return lambda: problem.multiply(given.out)


def exp_figures(run: Run) -> Iterator[Figure]:
    """Shape after shape over all heads; keeps the row of the best."""
    heads = run.shapes
    rows = {head: min(head.rows, MOST_ROWS) for head in heads}
    library: dict[Head, float] = {}
    best = math.inf
    for number, (tiles, programs) in enumerate(TOY_SHAPES if run.is_dry else SHAPES):
        ratios: dict[str, float] = {}
        for head in heads:
            given = operands(head, rows[head], run.device)
            work = 2e-9 * rows[head] * head.width * head.vocabulary
            if head not in library:
                plain = milliseconds(lambda given=given: product(given), run.device, run.rounds, BUSY_MS).ms
                library[head] = plain
                yield Figure("exp", head.name, "h W^T of the library", rows[head], plain, work / plain, "TFLOP/s")
            try:
                ms = milliseconds(exp_product(given, tiles, programs), run.device, run.rounds, BUSY_MS).ms
            except Exception as error:  # too much memory on the chip, say: the other shapes are still worth their time
                print(f"shape {number} on {head.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            ratios[head.name] = ms / library[head]
            yield Figure(
                "exp", head.name, f"shape {number}: {tiles} x {programs}", rows[head], ms, work / ms, "TFLOP/s"
            )
        if len(ratios) == len(heads) and (mean := geometric_mean(list(ratios.values()))) < best:
            best = mean
            keep(run, tiles, programs, ratios)
            headline(run.out, f"tune: shape {number} takes {mean:.3f} times the library's h W^T: {rounded(ratios)}")


def product(given: Operands) -> Tensor:
    return torch.mm(given.hidden, given.weight.t(), out=given.out)


def keep(run: Run, tiles: dict[str, int], programs: int, ratios: dict[str, float]) -> None:
    name = form.architecture(torch.device(run.device))
    row = {**form.row_of(name), "tiles": tiles, "programs": programs, "proved": None, "beside library": rounded(ratios)}
    folder = run.out / "tuned"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({name: row}, indent=1) + "\n")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


def library_figures(run: Run) -> Iterator[Figure]:
    for head in run.shapes:
        for rows in row_counts(head, run):
            given = operands(head, rows, run.device)
            work = 2e-9 * rows * head.width * head.vocabulary
            for what, call in library_products(given).items():
                ms = milliseconds(call, run.device, min(run.rounds, 5), BUSY_MS).ms
                yield Figure("library", head.name, what, rows, ms, work / ms, "TFLOP/s")


def row_counts(head: Head, run: Run) -> list[int]:
    """All rows, as many as the default budget holds, and the two multiples of 128 below that."""
    probe = torch.empty(0, head.width, dtype=BF16), torch.empty(1, 1).expand(head.vocabulary, head.width)
    fit = min(head.rows, rows_within(default_budget(torch.device(run.device)), *probe))
    lower = [fit // 128 * 128 - 128 * number for number in range(2)]
    return sorted({rows for rows in (head.rows, fit, *lower) if rows > 0})


def library_products(given: Operands) -> dict[str, Callable[[], object]]:
    hidden, weight, _, delta = given
    delta.normal_(0, 1e-3)
    dh, dw = torch.empty_like(hidden), torch.empty_like(weight)
    found = {
        "dh": lambda: torch.mm(delta, weight, out=dh),
        "dW": lambda: torch.mm(delta.t(), hidden, out=dw),
        "dh, sums reduced in float32": in_float32(lambda: torch.mm(delta, weight, out=dh)),
        "dW, sums reduced in float32": in_float32(lambda: torch.mm(delta.t(), hidden, out=dw)),
    }
    if delta.is_cuda and torch.version.hip is None:
        wide = torch.empty(dw.shape, device=dw.device)
        found["dW in float32"] = lambda: torch.ops.aten.mm.dtype_out(delta.t(), hidden, torch.float32, out=wide)
    return found


def in_float32(call: Callable[[], object]) -> Callable[[], object]:
    flags = torch.backends.cuda.matmul

    def run() -> None:
        before, flags.allow_bf16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction, False
        call()
        flags.allow_bf16_reduced_precision_reduction = before

    return run


def cast_figures(run: Run) -> Iterator[Figure]:
    for head in run.shapes:
        total = torch.randn(head.vocabulary, head.width, device=run.device)
        factor, like = torch.tensor(0.5, device=run.device), total.to(BF16)
        calls = {"scaled_to": lambda t=total, f=factor: scaled_to(t, f, BF16), "copy": lambda a=like: a.clone()}
        for what, call in calls.items():
            ms = milliseconds(call, run.device, run.rounds, BUSY_MS).ms
            moved = (6 if what == "scaled_to" else 4) * total.numel()  # bytes read and written
            yield Figure("cast", head.name, what, head.vocabulary, ms, 1e-6 * moved / ms, "GB/s")


def row_figures(run: Run) -> Iterator[Figure]:
    for head in run.shapes:
        rows = min(head.rows, MOST_ROWS)
        _, _, labels, logits = operands(head, rows, run.device)
        logits.normal_()
        logp, lse = torch.empty(rows, device=run.device), torch.empty(2, rows, device=run.device)
        arguments = (logits, labels, -100, PLAIN, logp, lse)
        for kernel in kernels(logits):
            for kind, passes in (("forward", 1), ("delta_", 2)):
                function = getattr(kernel, kind)
                ms = milliseconds(lambda f=function: f(*arguments), run.device, run.rounds, BUSY_MS).ms  # noqa: B023
                yield Figure(
                    "rows", head.name, f"{kind} {kernel.NAME}", rows, ms, 1e-6 * passes * logits.nbytes / ms, "GB/s"
                )


def main(arguments: list[str] | None = None) -> int:
    run = read_arguments(__doc__, arguments)
    with (run.out / "tuning.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Figure._fields)
        for part in (exp_figures, cast_figures, library_figures, row_figures):
            for figure in part(run):
                writer.writerow(figure)
                file.flush()
                f = figure
                print(
                    f"{f.part:<8} {f.head:<10} {f.rows:6d}  {f.ms:9.3f} ms {f.rate:8.1f} {f.unit}  {f.what}", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
