"""Log-probability of each target token, from hidden states: the logits are never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from wrpo_kernels.linear_token_logp import contract
from wrpo_kernels.lm_head.inputs import checked_options, checked_tensors
from wrpo_kernels.lm_head.labels import with_shifted_labels
from wrpo_kernels.lm_head.rows import count_labels, count_rows, nan_unless_counted


def linear_token_logp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool | int = False,
    num_rows: int | None = None,
    budget_bytes: int | None = None,
    grad_filter: float | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each target token under a language-model head, without storing the logits.

        z = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap) / temperature      (no softcap: no tanh)
        logp[n] = z[n, target[n]] - logsumexp_v z[n, v]

    target[..., t] is predicted from hidden[..., t]. In a batch of Hugging Face it is from hidden[..., t - 1]: pass its
    labels whole and shift=True.

    Args:
        hidden: [..., D] float32 | bfloat16 | float16, the hidden states that the head receives. Their type is the
            type of the matrix products.
        weight: [V, D] head, any floating type (another than `hidden`'s is converted for the products).
        target: [...] int64 | int32 in [0, V), or `ignore_index`.
        bias: [V] of the head. Default: none.
        adapter: (low [..., r], up [V, r]) of a LoRA on the head, which adds low up^T to hidden W^T: low = s A(hidden),
            up = B. Nothing of size [V, D] is made for it. Both are rounded to the type of `hidden`, whose range they
            must fit. Default: none.
        logit_scale: factor on the head's output. Default: 1.
        softcap: bound of the tanh, in nats. Default: none.
        temperature: divides the scores, > 0. Default: 1.
        ignore_index: such positions never reach the head: logp 0, gradient 0. Default: -100.
        shift: how many positions before its label a hidden state stands; True is 1. logp[..., t] is then of
            target[..., t + shift], and 0 at the last `shift` positions. Only labels are moved. Default: False, 0.
        num_rows: how many labels count (of shifted ones, those that are left), where the caller knows: an accelerator
            is then never waited for. A wrong number is an error on the CPU and gives NaN elsewhere. Default: counted,
            which waits once.
        budget_bytes: what the logits that exist at a time may take. Default: 512 MiB; on an accelerator a 32nd of its
            memory, at most 4 GiB.
        grad_filter: eps > 0 leaves out of the gradients of `hidden` and `weight` the tokens U that are the target of no
            row of a chunk and have |d logp / d logit| < eps in all of them. With c the upstream gradient,
            |error of dh_t| <= |c_t| eps sum_{v in U} |W_v| and |error of dW_v| <= eps sum_t |c_t| |h_t|, v in U; the
            other rows of dW are exact. Pays for a trained model, which leaves few others; proof in `column_filter`. An
            accelerator is waited for once a chunk. Default: None, exact.
        logits_dtype: torch.float32 for logits of 16-bit operands that are not rounded before their softmax; see
            Numerics. Default: None, that of `hidden`.
        backend: "native", "cuda", "triton" or "reference", the row kernel; "triton_exp", in bfloat16 and without a
            `grad_filter`, a product that leaves powers of the scores and needs no row kernel; "triton_fused" writes no
            logits where nothing needs a gradient and the head has no adapter, and is "triton" elsewhere. Default: the
            first that can; "triton_fused" never, "triton_exp" on cards where its tests have run.

    Returns:
        [...] float32, nats, <= 0; differentiable in `hidden`, `weight`, `bias` and `adapter` for any upstream gradient,
        as often as the graph is kept. Each gradient has the type of its tensor. (float64 for float64 hidden states.)

    Raises:
        ValueError: a shape, dtype, device, option or target out of range; the message names it. On an accelerator a
            target out of range makes NaN of its own log-prob instead, for reading it would wait.
        TypeError: an argument is of another kind.
        RuntimeError: the backend that was asked for refuses; the message holds its reason.

    Compiled: `num_rows` may change from call to call; each new value of another number compiles again.

    Numerics: logits have the type of `hidden`: of 16 bits, each is rounded once, by up to 2^-9 (bfloat16) or 2^-12
        (float16) of its size, as a head of that type rounds it, and log-probs err by about 0.01 in bfloat16.
        logits_dtype=torch.float32 keeps the product's float32 sums (on a CPU to 2^-18 or 2^-24 of a logit), and
        log-probs err by about 1e-4; deltas, and with them the products of the gradients, keep the type of `hidden`.
        What either way errs and costs is in docs/own_loop.md. "triton_exp" and the forward of "triton_fused" never
        round a logit. Autocast, under which F.linear would cast, changes nothing: pass
        hidden.to(torch.get_autocast_dtype(...)) for what it does. All sums run in float32. dW is summed inside each
        product and, where the rows need several, across them; a 16-bit product on the CPU is rounded to its type before
        it is added, and one on a GPU may add parts of its sum in 16 bits where torch lets it, as it does by default
        (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`). Of an adapter, low up^T is rounded once
        to the type of the logits before hidden W^T is added. The same bits on every run.
    Memory: `budget_bytes`, of which 4 (D + r) values a row are for what is multiplied by the head, held until the
        backward if the head or an adapter is trained, and 4 bytes a logit that is float32 beside 16-bit operands, 6
        while its delta is made; beside it a float32 dW when a 16-bit head's rows do not fit the budget at once and
        would take more memory so, and a converted weight when its type is not that of `hidden`. "triton_exp" takes 3 %
        of the logits' memory more.
    Cost: 2NDV flops forward alone, 4NDV with a frozen head, 6NDV with a trained one, plus 2DV for each row whose
        logits did not fit the budget; where a CPU makes float32 logits of 16-bit operands another 2DV each time it
        makes those of a row. N counts only the rows that are not ignored. An adapter adds 2NrV for its share of the
        logits and for each of its gradients; on a frozen head deltas are then kept as for a trained one.
    Source: WRPO, arXiv:2412.03187; online softmax, arXiv:1805.02867.
    """
    tensors = checked_tensors(hidden, weight, target, bias, adapter)
    tensors = with_shifted_labels(tensors, "target", shift, ignore_index)
    target = tensors.target
    counted = count_labels(target.reshape(1, -1), ignore_index)
    rows = count_rows(counted, target.numel(), num_rows)
    transform = (logit_scale, softcap, temperature)
    options = checked_options(tensors, *transform, ignore_index, rows, budget_bytes, grad_filter, logits_dtype, backend)
    logp, _, _ = contract.linear_token_logp(tensors, options)
    (logp,) = nan_unless_counted((logp,), counted, num_rows)
    return logp
