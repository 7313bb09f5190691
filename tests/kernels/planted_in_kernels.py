"""Errors planted inside the reference kernels and the passes around them, by changed source; `fuzz` must see them.

python tests/kernels/planted_in_kernels.py [--cases 300] [--seed 1]        how soon, and in how many cases
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

from fuzz import Wrong, run_case

ROWS, STATISTICS, LOSSES, PASSES = (
    f"wrpo_kernels.{name}"
    for name in (
        "token_logp.reference",
        "linear_token_statistics.reference",
        "preference_loss.reference",
        "linear_token_logp.passes",
    )
)


class Change(NamedTuple):
    module: str
    right: str
    wrong: str


PLANTED = {
    "the scale left out of the slope": Change(ROWS, "delta * transform.slope", "delta / transform.temperature"),
    "the slope of the softcap of another sign": Change(ROWS, "delta * (1 - (scores", "delta * (1 + (scores"),
    "log(1 + e) of the wrong odds": Change(ROWS, "torch.log1p(rest / mine)", "torch.log1p(rest / (mine + rest))"),
    "1 - p of the label as p": Change(ROWS, "-torch.expm1(logp)", "torch.exp(logp)"),
    "the bias after the scale": Change(
        ROWS, "z = z + transform.bias.to(z.dtype)", "z = z + transform.bias.to(z.dtype) / transform.logit_scale"
    ),
    "a delta 0.05 % too large": Change(ROWS, "delta * transform.slope", "1.0005 * delta * transform.slope"),
    "the upstream gradient left out": Change(ROWS, "* grad_logp[rows, None]).where(counts, 0.0)", ")"),
    "the entropy left out of its slope": Change(STATISTICS, "(log_share + entropy)", "log_share"),
    "the mean's gradient not divided": Change(STATISTICS, "of_mean / logits.shape[1]", "of_mean"),
    "a sum of squares that is one of probabilities": Change(STATISTICS, "share.square().sum(1)", "share.sum(1)"),
    "half the distance of ipo": Change(LOSSES, "distance = (margin - 0.5)", "distance = (margin - 0.25)"),
    "the kink of the hinge at 0": Change(LOSSES, "-(margin < 1)", "-(margin < 0)"),
    "the smoothing left out of the slope": Change(LOSSES, "shape - torch.sigmoid", "-torch.sigmoid"),
    "the odds of exo the wrong way round": Change(
        LOSSES, "margin - of_right + of_wrong", "margin + of_right - of_wrong"
    ),
    "tau left out of the slope of discopop": Change(LOSSES, "(rest / shape - 1)", "(rest - 1)"),
    "the loss of kto rising": Change(LOSSES, "return torch.sigmoid(-margin), -", "return torch.sigmoid(-margin), "),
    "the likelihood of another sign in the coefficient": Change(LOSSES, "coef = coef - nll", "coef = coef + nll"),
    "the length left out of the reward": Change(LOSSES, "beta * weighted(scale, ratio)", "beta * ratio"),
    "the coefficients of the first rows for every chunk": Change(
        PASSES, "add(rows, first, delta, coef[first:last])", "add(rows, first, delta, coef[: last - first])"
    ),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The module as if its source had the error; it is itself again afterwards."""
    path, right, wrong = PLANTED[name]
    module = import_module(path)
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{path} must hold {right!r} once: the planted error is out of date"
    before = dict(vars(module))
    try:
        exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module))
        yield
    finally:
        vars(module).update(before)


def seen_in(name: str, seed: int, cases: int) -> Iterator[int]:
    """The cases of the seed in which an error shows."""
    with planted(name):
        for case in range(cases):
            try:
                run_case(seed, case, backends=("reference",))
            except (Wrong, RuntimeError):
                yield case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name in PLANTED:
        seen = list(seen_in(name, options.seed, options.cases))
        print(f"{name:<52} first {seen[0] if seen else 'never':>5}, in {len(seen):>4} of {options.cases}")


if __name__ == "__main__":
    main()
