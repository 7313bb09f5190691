"""Random calls of the public losses, log-probs and statistics, on every backend of this CPU, against `closed_form`.

    python tests/kernels/fuzz.py [--seconds 60] [--seed 20261129] [--case 17]        (make fuzz)

Case n of a seed is always the same call. The seed is the day, in UTC, unless it is given here or as WRPO_FUZZ_SEED.
Exit status 1 at the first case that is wrong; it is printed with everything that was drawn, and with the command that
repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import torch
from closed_form import Bounded, exact, head_gradients, logits, preferences, rows, scores, statistics
from draws import (
    DTYPES,
    VOCABULARIES,
    Draw,
    draw_cotangent,
    draw_head,
    draw_linear,
    draw_loss,
    draw_reference,
    draw_target,
    draw_wrpo,
)
from torch import Tensor

import wrpo_kernels

OPS = SimpleNamespace(
    token_logp=wrpo_kernels.token_logp,
    linear_token_logp=wrpo_kernels.linear_token_logp,
    linear_token_statistics=wrpo_kernels.linear_token_statistics,
    preference_loss=wrpo_kernels.preference_loss,
    linear_nll_loss=wrpo_kernels.linear_nll_loss,
    linear_preference_loss=wrpo_kernels.linear_preference_loss,
    wrpo_loss=wrpo_kernels.wrpo_loss,
    linear_wrpo_loss=wrpo_kernels.linear_wrpo_loss,
)
OUTPUTS = ("entropy", "lse", "top1", "mean_logits", "log_sum_sq_probs")
TRAINED = ("logp", "entropy", "lse", "mean_logits", "log_sum_sq_probs")
SAFETY = 2.0  # the bounds are of first order


class Wrong(AssertionError):
    """A result beyond its bound."""


# -- what is checked --------------------------------------------------------------------------------------------------


def check_token_logp(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    dtype, vocabulary = draw.pick("dtype", *DTYPES), draw.pick("vocabulary", *VOCABULARIES)
    shape = draw.pick("shape", (), (0,), (1,), (7,), (2, 3), (2, 0), (13,))
    options = draw_head(draw, vocabulary, dtype, backends)
    target = draw_target(draw, shape, vocabulary, options["ignore_index"])
    counts = target != options["ignore_index"]
    x = 3 * torch.randn(*shape, vocabulary)
    if draw.chance("NaN where ignored", 0.3):
        x[~counts] = torch.nan
    x = draw.leaf("logits", x.to(dtype))
    logp = ops.token_logp(x, target, **options)
    flat = exact(x.detach().reshape(-1, vocabulary))
    true = rows(flat, target.reshape(-1), counts.reshape(-1), options, torch.float32)
    compare("logp", logp, true.logp.reshape(target.shape))
    c = draw_cotangent(target.shape)
    value = c.double().reshape(-1, 1) * true.delta.value
    error = c.double().abs().reshape(-1, 1) * true.delta.error
    bias_rounding = 2 * torch.finfo(dtype).eps  # the terms of its sum are those of the logits' gradient, rounded
    grads = {
        "logits": Bounded(value, error),
        "bias": Bounded(value.sum(0), error.sum(0) + bias_rounding * value.abs().sum(0) + least(dtype) * len(value)),
    }
    compare_gradients(logp, c, {"logits": x, "bias": options["bias"]}, grads)


def check_linear_token_logp(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    tensors, options = draw_linear(draw, draw.pick("shape", (), (0,), (1,), (7,), (2, 3), (13,)), backends)
    logp = ops.linear_token_logp(tensors["hidden"], tensors["weight"], tensors["target"], **options)
    true, counts = true_rows(tensors, options)
    compare("logp", logp, true.logp.reshape(tensors["target"].shape))
    c = draw_cotangent(tensors["target"].shape)
    compare_head_gradients(logp, c, exact(c.reshape(-1).where(counts, 0.0)), true.delta, tensors, options)


def check_linear_token_statistics(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    tensors, options = draw_linear(draw, draw.pick("shape", (), (0,), (1,), (7,), (2, 3), (13,)), backends)
    target = tensors["target"]
    outputs = tuple(name for name in OUTPUTS if draw.chance(name, 0.6))
    found = ops.linear_token_statistics(tensors["hidden"], tensors["weight"], target, outputs=outputs, **options)
    trained = [name for name in ("logp", *outputs) if name != "top1"]
    upstream = {name: draw_cotangent(target.shape) for name in trained}
    coef = {name: upstream.get(name, torch.zeros(target.shape)).reshape(-1).double() for name in TRAINED}
    size = torch.stack([*coef.values()]).abs().amax(0)  # stays out of the gradients of the logits, which are rounded
    size = size.where(size > 0, 1.0)
    raw, labels, counts = true_logits(tensors, options)
    shares = {name: c / size for name, c in coef.items()}
    true = statistics(raw, labels, counts, options, shares, tensors["hidden"].dtype)
    for name in trained:
        compare(name, getattr(found, name), true.values[name].reshape(target.shape))
    if "top1" in outputs:
        of_rows = scores(raw, options)
        chosen = of_rows.z.gather(1, found.top1.reshape(-1, 1).clamp(min=0))[:, 0]
        if (
            not (chosen >= of_rows.z.amax(1) - 2 * of_rows.error[:, 0])
            .where(counts, found.top1.reshape(-1) == -1)
            .all()
        ):
            raise Wrong(f"top1: got {found.top1.tolist()}")
    value, c = (torch.stack([x[name] for name in trained]) for x in (found._asdict(), upstream))
    compare_head_gradients(value, c, exact(size.where(counts, 0.0)), true.delta, tensors, options)


def check_preference_loss(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    num_sequences = draw.whole("sequences", 1, 9)
    options = draw_loss(draw, num_sequences) | {"backend": draw.pick("backend", *backends)}
    told, op = options, ops.preference_loss
    if draw.chance("WRPO", 0.3):
        options, told = draw_wrpo(draw, options)
        op = ops.wrpo_loss
    num_sequences = len(options["group"])
    options["empty"] = told["empty"] = draw.pick("empty", "raise", "zero")
    length = torch.randint(0 if options["empty"] == "zero" else 1, 40, (num_sequences,))
    if options["length_normalize"] or options["empty"] == "zero" or draw.chance("with length", 0.5):
        told = told | {"length": length}
    else:
        length = torch.ones_like(length)  # without lengths none is empty
    ref_logp = draw_reference(draw, num_sequences)
    logp = (-20 * torch.rand(num_sequences)).requires_grad_(draw.chance("gradient of logp", 0.8))
    out = op(logp, ref_logp, **told)
    true = preferences(exact(logp.detach()), ref_logp, length, options)
    c, upstream = compare_output(out, true, options)
    compare_gradients(out.loss, upstream, {"logp": logp}, {"logp": c})


def check_linear_preference_loss(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    num_sequences = draw.whole("sequences", 1, 7)
    options = draw_loss(draw, num_sequences)
    told, op = options, ops.linear_preference_loss
    if draw.chance("WRPO", 0.3):
        options, told = draw_wrpo(draw, options)
        op = ops.linear_wrpo_loss
    num_sequences = len(options["group"])
    tensors, head, sequence, length = draw_sequences(draw, num_sequences, backends)
    options["empty"] = "zero" if bool((length == 0).any()) else draw.pick("empty", "raise", "zero")
    told = told | head | {"empty": options["empty"]}
    ref_logp = draw_reference(draw, num_sequences)
    out = op(tensors["hidden"], tensors["weight"], tensors["target"], ref_logp, **told)

    true, counts, logp = true_sequences(tensors, head, sequence, num_sequences)
    compare("logp", out.logp, logp)
    c, upstream = compare_output(out, preferences(logp, ref_logp, length, options), options)
    of_rows = Bounded(*(part[sequence].where(counts, 0.0) for part in c))
    compare_head_gradients(out.loss, upstream, of_rows, true.delta, tensors, head)


def check_linear_nll_loss(draw: Draw, ops: Any, backends: tuple[str, ...]) -> None:
    num_sequences = draw.whole("sequences", 1, 7)
    tensors, head, sequence, length = draw_sequences(draw, num_sequences, backends)
    weights = draw.pick("seq_weight", None, (0.5 + torch.rand(num_sequences)) * (torch.rand(num_sequences) > 0.15))
    normalizer = draw.pick("normalizer", None, draw.number("-", 0.5, 9.0))
    told = head | {"seq_weight": weights, "normalizer": normalizer}
    out = ops.linear_nll_loss(tensors["hidden"], tensors["weight"], tensors["target"], **told)

    true, counts, logp = true_sequences(tensors, head, sequence, num_sequences)
    compare("logp", out.logp, logp)
    by = max(int(length.sum()), 1) if normalizer is None else normalizer
    w = (torch.ones(num_sequences) if weights is None else weights).double() / by
    rounding = num_sequences * torch.finfo(torch.float32).eps * (w * logp.value).abs().sum()
    value = Bounded(-(w * logp.value).sum(), (w.abs() * logp.error).sum() + rounding)
    compare("loss", out.loss, value.rounded(torch.float32))
    upstream = by * torch.randn(())  # as a loss scale: float16 has few bits for the mean of many tokens
    c = -upstream.double() * w
    c = Bounded(c, 4 * torch.finfo(torch.float32).eps * c.abs())  # weight, upstream and normalizer, each rounded
    of_rows = Bounded(*(part[sequence].where(counts, 0.0) for part in c))
    compare_head_gradients(out.loss, upstream, of_rows, true.delta, tensors, head)


def draw_sequences(
    draw: Draw, num_sequences: int, backends: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any], Tensor, Tensor]:
    """Tensors and options of a head over sequences, padded or packed; the sequence of each label, and [S] lengths."""
    packed = draw.chance("packed", 0.4)
    longest = draw.whole("longest", 1, 9)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, longest + 1, (num_sequences,)).cumsum(0)])
    shape = (int(bounds[-1]),) if packed else (num_sequences, longest)
    tensors, head = draw_linear(draw, shape, backends)
    counts = tensors["target"] != head["ignore_index"]
    sequence = torch.repeat_interleave(torch.arange(num_sequences), bounds.diff() if packed else longest)
    length = torch.zeros(num_sequences, dtype=torch.int64).index_add(0, sequence, counts.reshape(-1).long())
    head["lengths"] = draw.pick("lengths", None, length, length.tolist())
    if packed:
        head["cu_seqlens"] = bounds.to(draw.pick("bounds in", torch.int32, torch.int64))
    return tensors, head, sequence, length


def true_sequences(
    tensors: dict[str, Any], head: dict[str, Any], sequence: Tensor, num_sequences: int
) -> tuple[Any, Tensor, Bounded]:
    """The rows, which of them count, and the log-probs [S]."""
    true, counts = true_rows(tensors, head)
    zeros = torch.zeros(num_sequences, dtype=torch.float64)
    logp = Bounded(*(zeros.index_add(0, sequence, part) for part in true.logp)).rounded(torch.float32)
    return true, counts, logp


CHECKS: tuple[Callable, ...] = (
    check_token_logp,
    check_linear_token_logp,
    check_linear_token_logp,
    check_linear_token_statistics,
    check_preference_loss,
    check_linear_preference_loss,
    check_linear_preference_loss,
    check_linear_preference_loss,
    check_linear_nll_loss,
)


def least(dtype: torch.dtype) -> float:
    """The smallest number above 0."""
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


def true_logits(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[Bounded, Tensor, Tensor]:
    """[N, V], the labels [N] and which of them count."""
    hidden, weight = tensors["hidden"].detach(), tensors["weight"].detach()
    target = tensors["target"].reshape(-1)
    raw = logits(hidden.reshape(-1, hidden.shape[-1]), weight, flat_adapter(options), options["logits_dtype"])
    return raw, target, target != options["ignore_index"]


def true_rows(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Tensor]:
    raw, target, counts = true_logits(tensors, options)
    return rows(raw, target, counts, options, tensors["hidden"].dtype), counts


def flat_adapter(options: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    if options["adapter"] is None:
        return None
    low, up = (part.detach() for part in options["adapter"])
    return low.reshape(-1, low.shape[-1]), up


def compare_output(out: Any, true: Any, options: dict[str, Any]) -> tuple[Bounded, Tensor]:
    """d (upstream loss) / d logp [S], and the upstream gradient, drawn."""
    by = 1.0
    if options["reduction"] == "mean":
        by = float(true.num_counted if options["normalizer"] is None else options["normalizer"])
    whole = Bounded(*(part.sum() / by for part in true.loss)).rounded(torch.float32)
    compare("loss", out.loss, true.loss if options["reduction"] == "none" else whole)
    compare("reward", out.reward, true.reward)
    compare("margin", out.margin, true.margin)
    upstream = torch.randn(out.loss.shape)
    u = upstream.double().expand(options["num_groups"])[options["group"]] / by
    return Bounded(u * true.coef.value, u.abs() * true.coef.error), upstream


def compare_head_gradients(
    out: Tensor, upstream: Tensor, c: Bounded, delta: Bounded, tensors: dict[str, Any], options: dict[str, Any]
) -> None:
    hidden, weight = tensors["hidden"], tensors["weight"]
    low, up = options["adapter"] or (None, None)
    true = head_gradients(
        c, delta, hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), flat_adapter(options)
    )
    inputs = {"hidden": hidden, "weight": weight, "bias": options["bias"], "low": low, "up": up}
    compare_gradients(out, upstream, inputs, true)


def compare_gradients(
    out: Tensor, upstream: Tensor, inputs: dict[str, Tensor | None], true: dict[str, Bounded]
) -> None:
    wanted = {name: x for name, x in inputs.items() if x is not None and x.requires_grad}
    if out.requires_grad != bool(wanted):
        raise Wrong(f"requires_grad: got {out.requires_grad} with gradients of {list(wanted)}")
    if not wanted:
        return
    found = torch.autograd.grad(out, list(wanted.values()), upstream)
    for (name, x), grad in zip(wanted.items(), found, strict=True):
        if grad.dtype != x.dtype:
            raise Wrong(f"gradient of {name}: got {grad.dtype}, expected {x.dtype}")
        compare(f"gradient of {name}", grad, true[name].reshape(x.shape).rounded(x.dtype))


def compare(name: str, got: Tensor, true: Bounded) -> None:
    if got.shape != true.value.shape:
        raise Wrong(f"{name}: shape {list(got.shape)}, expected {list(true.value.shape)}")
    distance = (got.detach().double() - true.value).abs()
    allowed = SAFETY * true.error + least(torch.float32)
    wrong = ~(distance <= allowed)  # also NaN
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise Wrong(
            f"{name}{list(at)}: got {got[at].item():.9g}, expected {true.value[at].item():.9g} within "
            f"{allowed[at].item():.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )


# -- the run ----------------------------------------------------------------------------------------------------------


def backends_here() -> tuple[str, ...]:
    found = []
    for backend in ("native", "reference"):
        try:
            wrpo_kernels.token_logp(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend=backend)
            found.append(backend)
        except RuntimeError:
            continue  # not built here
    return tuple(found)


def run_case(seed: int, case: int, ops: Any = OPS, backends: tuple[str, ...] = ("native", "reference")) -> None:
    """Raises Wrong for a result, RuntimeError for an exception, with everything that was drawn."""
    draw = Draw(seed, case)
    check = CHECKS[case % len(CHECKS)]
    try:
        check(draw, ops, backends)
    except Exception as error:
        drawn = "\n".join(f"  {name}: {value}" for name, value in draw.said.items() if name != "-")
        repeat = f"python tests/kernels/fuzz.py --seed {seed} --case {case}"
        report = f"{check.__name__.removeprefix('check_')}: {error}\n{drawn}\nrepeat: {repeat}"
        raise (Wrong if isinstance(error, Wrong) else RuntimeError)(report) from error


def run(seed: int, seconds: float, ops: Any = OPS) -> int:
    """As many cases as fit; how many. Raises as `run_case`."""
    end, backends = time.monotonic() + seconds, backends_here()
    for case in itertools.count():
        if time.monotonic() > end:
            return case
        run_case(seed, case, ops, backends)
    raise AssertionError("unreachable")


def seed_of_the_day() -> int:
    return int(os.environ.get("WRPO_FUZZ_SEED") or datetime.now(timezone.utc).strftime("%Y%m%d"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=seed_of_the_day(), help="of all cases (default: the day)")
    parser.add_argument("--case", type=int, help="this one case alone")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        if options.case is not None:
            run_case(options.seed, options.case, backends=backends_here())
            print(f"case {options.case} of seed {options.seed} is right")
        else:
            count = run(options.seed, options.seconds)
            print(f"{count:,} cases of seed {options.seed} are right, on {', '.join(backends_here())}")
    except (Wrong, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
