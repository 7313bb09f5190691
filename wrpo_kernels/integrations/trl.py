"""TRL's DPO, SFT, KTO, GRPO and RLOO trainers with the head of this library in the place of their own.

    from wrpo_kernels.integrations import trl
    trl.install()

All five make their log-probs in one function of TRL, which projects a tile of the vocabulary at a time and projects it
again in the backward. `install` puts `linear_token_logp` there; losses, metrics and everything else stay TRL's.
"""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wrpo_kernels.checks import check_backend_name
from wrpo_kernels.integrations.autocast import as_linear_takes_it
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.lm_head.budget import check_budget
from wrpo_kernels.logit_transform import LogitTransform
from wrpo_kernels.token_logp.reference import scores_of

__all__ = ["install", "uninstall"]

KNOWN = ("1.16",)
FUNCTION, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"  # the names in trl.trainer.utils that are replaced
TAKES = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale"]
TAKES += ["outputs"]
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order in which TRL expects them
STATISTICS_BYTES = 64 << 20  # of float32 logits at a time

_originals: dict[str, Any] = {}


def install(*, budget_bytes: int | None = None, backend: str | None = None) -> None:
    """Puts this library's head into TRL's trainers, those that exist already too. A second call changes the options.

    Args:
        budget_bytes, backend: as linear_token_logp.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL makes its log-probs elsewhere or otherwise.

    A TRL that was not tried with this version of the library warns. Under DeepSpeed's ZeRO-3 a step is refused.
    """
    check_backend_name(backend)
    check_budget(budget_bytes, torch.device("cpu"))
    utils = _utils_of_trl()
    if not _originals:
        _check_version(utils)
        _originals.update({name: getattr(utils, name) for name in (FUNCTION, COMPACTS)})
    options = {"budget_bytes": budget_bytes, "backend": backend}
    setattr(utils, FUNCTION, type("WrpoTokenLogp", (_TokenLogp,), {"options": options}))
    setattr(utils, COMPACTS, lambda device: True)  # there it only decides whether rows without a label are left out


def uninstall() -> None:
    """Gives TRL its own head back; without an `install` before it does nothing."""
    for name, value in _originals.items():
        setattr(_utils_of_trl(), name, value)
    _originals.clear()


def _utils_of_trl() -> ModuleType:
    import trl.trainer.utils

    return trl.trainer.utils


def _check_version(utils: ModuleType) -> None:
    found = version("trl")
    function = getattr(utils, FUNCTION, None)
    takes = list(inspect.signature(function.forward).parameters)[1:] if hasattr(function, "forward") else None
    if takes != TAKES or not callable(getattr(utils, COMPACTS, None)):
        raise RuntimeError(
            f"TRL {found} does not make its log-probs where TRL {' and '.join(KNOWN)} does; use one of these, or leave "
            "install() out: TRL then runs with its own head"
        )
    if ".".join(found.split(".")[:2]) not in KNOWN:
        warnings.warn(
            f"wrpo_kernels was tried with TRL {' and '.join(KNOWN)}, not with {found}; compare a few steps with and "
            "without install()",
            RuntimeWarning,
            stacklevel=3,
        )


class _TokenLogp:
    """Called as TRL calls its own autograd function."""

    options: dict[str, Any]

    @classmethod
    def apply(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL,
    ) -> tuple[Tensor | None, ...]:
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "DeepSpeed's ZeRO-3 takes the head's weight away before the backward needs it; call "
                "wrpo_kernels.integrations.trl.uninstall(), or use ZeRO 1 or 2, or FSDP"
            )
        hidden = as_linear_takes_it(hidden)
        transform = LogitTransform(bias, logit_scale, softcap or 0.0, temperature)
        logp = linear_token_logp(hidden, weight, targets, **transform._asdict(), **cls.options)
        wanted = [name for name in OPTIONAL if name in outputs]
        found = _statistics(hidden, weight, targets, transform, wanted) if wanted else {}
        if "entropy" in found:
            found["entropy"] = _WithoutGradient.apply(found["entropy"], logp)
        return logp, *(found.get(name) for name in OPTIONAL)


class _WithoutGradient(torch.autograd.Function):
    """A value that must not be trained on: it looks differentiable, and a gradient that comes to it raises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, like: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is not None:
            raise NotImplementedError(
                "the entropy has no gradient here; set entropy_coef to 0, or call "
                "wrpo_kernels.integrations.trl.uninstall()"
            )
        return None, None


@torch.no_grad()
def _statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, transform: LogitTransform, wanted: list[str]
) -> dict[str, Tensor]:
    """[N] each, of logits that are made once more, some rows at a time."""
    head = weight.to(hidden.dtype).t()
    step = max(1, STATISTICS_BYTES // (4 * len(weight)))
    parts = [
        _of_scores(scores_of(some @ head, transform), own, wanted)
        for some, own in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in wanted}


def _of_scores(scores: Tensor, targets: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    log_share = scores.log_softmax(-1)
    made = {
        "entropy": lambda: -(log_share.exp() * log_share).sum(-1),
        "log_sum_sq_probs": lambda: (2 * log_share).logsumexp(-1),
        "mean_logits": lambda: scores.mean(-1),
        "is_top1": lambda: scores.argmax(-1) == targets,
    }
    return {name: made[name]() for name in wanted}
