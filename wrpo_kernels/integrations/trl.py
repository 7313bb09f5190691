"""TRL's DPO, SFT, KTO, GRPO and RLOO trainers with the head of this library in the place of their own.

    from wrpo_kernels.integrations import trl
    trl.install()

All five make their log-probs in one function of TRL, which projects a tile of the vocabulary at a time and projects it
again in the backward. `install` puts `linear_token_logp` there, or `linear_token_statistics` where TRL asks for more;
losses, metrics and everything else stay TRL's.
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
from wrpo_kernels.integrations.operands import as_linear_takes_it
from wrpo_kernels.linear_token_logp import linear_token_logp
from wrpo_kernels.linear_token_statistics import linear_token_statistics
from wrpo_kernels.lm_head.budget import check_budget

__all__ = ["install", "uninstall"]

KNOWN = ("1.16",)
FUNCTION, COMPACTS = "_ChunkedLogProbFunction", "_use_triton"  # the names in trl.trainer.utils that are replaced
TAKES = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale"]
TAKES += ["outputs"]
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order in which TRL expects them
OURS = {**{name: name for name in OPTIONAL}, "is_top1": "top1"}

_replaced: list[tuple[ModuleType, str, Any]] = []  # module, name and what TRL has there


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
    if not _replaced:
        _check_version(utils)
        _replaced.extend((utils, name, getattr(utils, name)) for name in (FUNCTION, COMPACTS))
    options = {"budget_bytes": budget_bytes, "backend": backend}
    setattr(utils, FUNCTION, type("WrpoTokenLogp", (_TokenLogp,), {"options": options}))
    setattr(utils, COMPACTS, lambda device: True)  # there it only decides whether rows without a label are left out


def uninstall() -> None:
    """Gives TRL its own head back; without an `install` before it does nothing."""
    for module, name, value in _replaced:
        setattr(module, name, value)
    _replaced.clear()


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
        head: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
        }
        hidden = as_linear_takes_it(hidden)
        wanted = tuple(OURS[name] for name in OPTIONAL if name in outputs)
        if not wanted:
            return linear_token_logp(hidden, weight, targets, **head, **cls.options), None, None, None, None
        found = linear_token_statistics(hidden, weight, targets, outputs=wanted, **head, **cls.options)
        without_gradient = (found.log_sum_sq_probs, found.mean_logits)  # as TRL has them
        is_top1 = None if found.top1 is None else found.top1 == targets
        return found.logp, found.entropy, *(None if x is None else x.detach() for x in without_gradient), is_top1
