"""Reference log-probs log pi_ref(y|x), [S] float32, summed over each response's tokens.

    copy         a frozen copy of the model, run beside it
    adapter      the PEFT model itself with its adapters off
    precompute   one pass over the data before the first step, see `wrpo.reference.precomputed`; or brought by the data
    none         reference-free

Every pass goes through the same fused head and kernels as the policy, in evaluation mode, without gradients, in the
policy's arithmetic: under its autocast, and where FSDP or DeepSpeed have an arithmetic of their own, adapter and
precompute run through the wrapped policy, copy through a copy that FSDP has wrapped like it, or that DeepSpeed's type
was given to. So at step 0, where policy and reference are the same model, both log-probs agree if
it has no dropout, which is on in the policy's training alone: bit by bit where both passes multiply matrices of the
same shapes (copy and adapter see the policy's own batches), else up to rounding (precompute batches other rows
together). No pass draws random numbers or changes the order of the data.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrpo.data.batch import num_counted, sum_by_response, tail_weight
from wrpo.data.collation import Batch
from wrpo.head.attention import model_inputs
from wrpo.head.fused_head import run_in_head
from wrpo.head.scores import PROBE_TOKENS, untouched
from wrpo.head.wrapping import is_partitioned
from wrpo_kernels import linear_token_logp

logger = logging.getLogger("wrpo.reference")

WHILE_SHARDED = (
    "Take reference='precompute' for the policy's own weights before training, or give the data the column ref_logp, "
    "which `wrpo logp --reference MODEL` writes"
)
Reference = Callable[[nn.Module, Batch], Tensor | None]  # (policy as the trainer wrapped it, batch) -> [S] or None


def sequence_logp(model: nn.Module, batch: Batch, ld_alpha: float | None = None, **options: Any) -> Tensor:
    """Summed log-probs [S] float32 of a batch's responses, without gradients and without a trace in the model.

    Args:
        model: with a fused head, or a wrapper of one.
        batch: of `PreferenceCollator`, in any layout.
        ld_alpha: weight of tokens beyond the row's shortest response. Default: all weigh 1.
        **options: budget_bytes and backend of `linear_token_logp`.
    """
    labels, num_rows = batch["labels"], num_counted(batch)

    def head_fn(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        rows = linear_token_logp(hidden, weight, labels, num_rows=num_rows, **head, **options)
        if ld_alpha is not None:
            rows = rows * tail_weight(batch, ld_alpha)
        return sum_by_response(rows, batch).float()

    with untouched(model):
        return run_in_head(model, head_fn, **model_inputs(batch))


def choose_reference(wanted: str, model: nn.Module, *, has_length: bool, has_reference: bool = False) -> str:
    """What "auto" means here, and whether what was named can be done.

    Args:
        wanted: "auto", "copy", "adapter", "precompute" or "none".
        model: the policy before training.
        has_length: every data set has a length, so it can be gone through once before training.
        has_reference: every data set brings `ref_logp` along; "auto" then uses it, as "precompute" does.

    Raises:
        ValueError: the named source cannot be had from this model or data, or "auto" cannot be found out; the message
            says why.
    """
    is_peft = hasattr(model, "disable_adapter")
    if wanted == "none":
        return "none"
    if wanted == "adapter" and not is_peft:
        raise ValueError(f"reference='adapter' needs a PEFT model, got {type(model).__name__}; use copy or precompute")
    if wanted == "precompute" and not has_length:
        raise ValueError("reference='precompute' needs data with a length; use copy for streams")
    partitioned = is_partitioned(model)
    if wanted == "adapter" and not partitioned and not adapters_are_fresh(model):
        logger.warning(
            "reference='adapter': the adapters already change the model's output, and the reference is the model "
            "without them. Where they hold the SFT stage, put fresh ones on model.merge_and_unload(), or use "
            "reference='precompute'."
        )
    if wanted != "auto":
        return wanted
    if is_peft and not has_reference and partitioned and not has_length:
        raise ValueError(
            "reference='auto' cannot run a model whose weights are spread over ranks or not there yet (ZeRO-3, meta "
            "device) to see whether its adapters are fresh: use reference='adapter' if they are"
        )
    if is_peft and not has_reference and not partitioned and adapters_are_fresh(model):
        return "adapter"
    return "precompute" if has_length else "copy"


def brings_reference(data: Any) -> bool:
    """Whether the rows have `ref_logp`; of a stream its column names say so.

    Raises:
        ValueError: some rows have it and others do not.
    """
    if not hasattr(data, "__len__"):
        return "ref_logp" in (getattr(data, "column_names", None) or ())
    if hasattr(data, "column_names"):
        lacks = [value is None for value in data["ref_logp"]] if "ref_logp" in data.column_names else [True]
    else:
        lacks = [data[index].get("ref_logp") is None for index in range(len(data))]
    if any(lacks) and not all(lacks):
        raise ValueError(
            f"ref_logp: expected one for every row or for none, got none in {sum(lacks)} of {len(lacks)}, the first in "
            f"row {lacks.index(True) + 1}. Complete the column, or remove it"
        )
    return not any(lacks)


def adapters_are_fresh(model: nn.Module) -> bool:
    """Whether the model gives the same logits with its adapters on and off, as it does before any training."""
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(PROBE_TOKENS, device=embedding.device)[None] % embedding.shape[0]
    with untouched(model):
        adapted = model(input_ids=ids, use_cache=False).logits
        with adapters_off(model):
            return torch.equal(adapted, model(input_ids=ids, use_cache=False).logits)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """PEFT's own switch, without what it does to `requires_grad`.

    It clears the flags of the adapters, and FSDP2 settles in its first forward, which may be this one, whose gradients
    it will reduce and in which type. When it ends it forgets what was frozen by hand.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)

    try:
        with model.disable_adapter():
            restore()
            yield
    finally:
        restore()


class FrozenCopy:
    """The reference as a model of its own, with a fused head, as it is wrapped."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager], **options: Any):
        self.model = model.eval()
        self.autocast, self.options = autocast, options

    def __call__(self, _policy: nn.Module, batch: Batch) -> Tensor:
        with self.autocast():
            return sequence_logp(self.model, batch, **self.options)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Raises ValueError for a model whose weights are spread over ranks."""
    refuse_partitioned(model, "copy")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(f"reference='copy' cannot copy weights that are spread over ranks. {WHILE_SHARDED}")
    return copy.deepcopy(model)


def refuse_partitioned(model: nn.Module, reference: str) -> None:
    """Raises ValueError: nothing would put together the weights of a model that runs beside the policy."""
    if is_partitioned(model):
        raise ValueError(
            f"reference={reference!r} runs this model unwrapped, and its weights are spread over ranks or not there "
            f"(ZeRO-3, meta device). {WHILE_SHARDED}"
        )


class AdaptersOff:
    """The policy without its adapters; run through the wrapped policy, which knows where its weights are."""

    def __init__(self, peft_model: nn.Module, **options: Any):
        self.peft_model, self.options = peft_model, options

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        with adapters_off(self.peft_model):
            return sequence_logp(policy, batch, **self.options)


def from_batch(_policy: nn.Module, batch: Batch) -> Tensor:
    """The reference as the data brings it along."""
    if "ref_logp" not in batch:
        raise ValueError(
            "the batch has neither ref_logp nor ref_place, but reference is 'precompute'. A data_collator of your own "
            "must hand the rows' ref_place on, [S] in the order of the responses; another data set than those given to "
            "the trainer must be given as eval_dataset. Or use reference='copy'"
        )
    return batch["ref_logp"]


def no_reference(_policy: nn.Module, _batch: Batch) -> None:
    return None
