"""What a model does to its logits after the head's product, read from its config and proved on its own logits.

    z = logit_scale * (h W^T + bias);  z = softcap * tanh(z / softcap)

Model families give the same config field different meanings: `logits_scaling` divides the logits of Granite, multiplies
those of HyperCLOVA X, and divides the hidden states of MiniCPM3 before the head. So the config only makes candidates;
the one that agrees with the model's own log-probs is taken. For the comparison the hidden states are magnified until
the largest score is `PROBE_SCORE`: the small scores of an untrained model would let a missing softcap pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wrpo_kernels import linear_token_logp

from .operands import head_operands

SCALE_FIELDS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1}  # exponent
SOFTCAP_FIELD = "final_logit_softcapping"

PROBE_TOKENS = 8
PROBE_SCORE = 40.0  # nats; beyond the usual softcaps (15 to 30), far below overflow in float16
# A score and the log-sum-exp beneath it each carry the head's product, a scale, a division, tanh and a product, rounded
# in the model's type: 2 * 5 half ulps. Unknown treatments of logits are off by nats.
PROBE_ULPS = 5.0


class HeadScores(NamedTuple):
    logit_scale: float = 1.0
    softcap: float | None = None  # nats


def transforms_of(config: Any) -> list[HeadScores]:
    """What the config may mean, most likely first; the last is no transform at all."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scales = [1.0]
    for name, exponent in SCALE_FIELDS.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales = [value**exponent, value**-exponent, 1.0]
            break
    softcap = getattr(config, SOFTCAP_FIELD, None)
    softcaps = [float(softcap), None] if softcap else [None]
    return [HeadScores(float(scale), cap) for cap, scale in product(softcaps, scales)]


def agreeing_transform(model: nn.Module, candidates: list[HeadScores], wrapped: nn.Module | None = None) -> HeadScores:
    """The first candidate under which the fused head and the model's own logits give the same log-probs.

    Args:
        model: a causal language model whose forward takes `head_fn`.
        candidates: see `transforms_of`.
        wrapped: what is called in its place, where its weights are there only then. Default: the model itself.

    Raises:
        ValueError: none does, or the model's own logits are no numbers.
    """
    run = model if wrapped is None else wrapped
    embedding = model.get_input_embeddings().weight
    tokens, size = getattr(embedding, "ds_shape", embedding.shape)  # [V, D]; ZeRO-3 empties what it has spread
    found: list[Tensor] = []
    with untouched(run), magnified(model.get_output_embeddings()):
        ids = torch.linspace(0, tokens - 1, PROBE_TOKENS, device=embedding.device).long()[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = run(**inputs, use_cache=False).logits
        _refuse_no_numbers(model, logits)
        target = torch.stack([logits.argmax(-1), logits.argmin(-1), ids.roll(1, 1)])  # [3, 1, 8]
        own = logits.float().log_softmax(-1).expand(3, -1, -1, -1).gather(-1, target[..., None])[..., 0]

        def fused(hidden: Tensor, weight: Tensor, *, bias: Any, adapter: Any = None, **_: Any) -> Tensor:
            hidden = hidden.expand(3, -1, -1, -1)
            if adapter is not None:
                adapter = (adapter[0].expand(3, -1, -1, -1), adapter[1])
            head = {"bias": bias, "adapter": adapter}
            rows = [linear_token_logp(hidden, weight, target, **head, **c._asdict()) for c in candidates]
            found[:] = [torch.stack(rows)]  # [candidates, 3, 1, 8]; what comes through a wrapper may be rounded
            return found[0]

        run(**inputs, head_fn=fused)
        error = (found[0] - own).abs().amax((1, 2, 3))
    # Both products add up D terms in float32, each in its own order: some sqrt(D) ulps of partial sums as large as the
    # scores (N. J. Higham and T. Mary, SIAM J. Sci. Comput. 41, 2019). It is what shows where the logits are float32.
    added_up = size**0.5 * torch.finfo(torch.float32).eps
    tolerance = (PROBE_ULPS * rounding_of(logits) + added_up) * PROBE_SCORE
    for candidate, worst in zip(candidates, error.tolist(), strict=True):
        if worst <= tolerance * max(1.0, abs(candidate.logit_scale)):
            return candidate
    raise ValueError(
        f"{type(model).__name__} post-processes its logits in a way the fused head does not know: log-probs differ "
        f"by {error[0]:.3g} nats, rounding explains {tolerance:.1g}. Known are a bias and LoRA on the head, and "
        f"{SOFTCAP_FIELD}, {', '.join(SCALE_FIELDS)} of the config"
    )


def _refuse_no_numbers(model: nn.Module, logits: Tensor) -> None:
    """-inf is a mask, and a treatment of logits like others."""
    if bool((logits < float("inf")).all()):
        return
    weights = (name for name, p in model.named_parameters() if not bool(p.isfinite().all()))
    raise ValueError(
        f"{type(model).__name__}: the model's own logits are not finite on a few tokens (NaN or infinity); the first "
        f"weight that is not: {next(weights, f'none, so {logits.dtype} overflows on the way')}. Load weights that are "
        "numbers, in a type that holds their activations (bfloat16 or float32)"
    )


def rounding_of(logits: Tensor) -> float:
    """Spacing of the numbers in which the scores were made, relative; float32 products may run in fewer bits (TF32)."""
    eps = torch.finfo(logits.dtype).eps
    shortened = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return max(eps, 2.0**-10) if shortened else eps


@contextmanager
def magnified(head: nn.Module) -> Iterator[None]:
    """While it lasts, the head's hidden states are scaled so that its largest score, without bias, is PROBE_SCORE."""

    def scale(_module: nn.Module, args: tuple) -> tuple:
        largest = head_operands(head, args[0]).scores(args[0]).abs().max().float()
        return (args[0] * (PROBE_SCORE / largest.clamp(min=1e-6)).to(args[0].dtype),)

    handle = head.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves the mode of every module and the random state as they were."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
