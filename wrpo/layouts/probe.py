"""Whether a model gives its tokens the same log-probs in a layout as in padded rows, tried out on rows of the data.

Models that build their own mask, carry a state (Mamba) or weigh attention by distance in the row (ALiBi) do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrpo.data.batch import num_counted, on_device
from wrpo.data.collation import IGNORE, Batch, with_layout
from wrpo.data.layout import PADDED, Layout
from wrpo.head.attention import model_inputs
from wrpo.head.fused_head import find_causal_lm, run_in_head
from wrpo.head.scores import untouched
from wrpo.user_error import in_one_line
from wrpo_kernels import linear_token_logp

# Root mean square of the differences, nats a token. Rounding: 2.8e-6 in float32, 0.018 and 0.029 in bfloat16 on a model
# of 30 layers. One of its layers that sees other responses: 0.058 to 0.224, all layers 2.8; wrong positions 0.8
# (SmolLM2-135M, CPU, 2026-11-30). Norms and positions of a model in float64 are float32 all the same.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
LONGEST = 160  # characters of another program's words


def disagreement(
    model: nn.Module, rows: list[dict], collator: Any, layout: Layout, autocast: Callable[[], AbstractContextManager]
) -> str | None:
    """Why the model cannot have the layout, in words; None where it gives the same log-probs as in padded rows.

    Args:
        model: with a fused head, or what it is wrapped in.
        rows: tokenised rows of the data.
        collator: of `wrpo.data`, whose layout is set here.
        autocast: under which training runs the model. Float32 weights are asked without it, and without TF32: who sees
            whom does not depend on it, and a fault of one layer could hide in the rounding of 16 bits. Flash-attention
            takes nothing else.

    Raises:
        DataError: rows that the collator refuses.
    """
    name = type(find_causal_lm(getattr(model, "module", model))).__name__
    is_exact = layout.attention != "bounds" and all(p.dtype.itemsize > 2 for p in model.parameters())
    arithmetic = in_full_float32 if is_exact else autocast
    batches = [with_layout(collator, wanted)(rows) for wanted in (PADDED, layout)]
    try:
        with arithmetic(), untouched(model):
            (padded, dtype), (other, _) = (token_logps(model, batch) for batch in batches)
            apart = float((padded - other).double().square().sum() / max(len(padded), 1)) ** 0.5
    except torch.OutOfMemoryError:  # padded rows would need more
        raise
    except Exception as error:  # whatever a model's own code does with inputs that it does not know
        return f"{layout.name} rows do not go through {name} ({in_one_line(error, LONGEST)})"
    tolerance = TOLERANCE[dtype]
    if apart <= tolerance:
        return None
    return (
        f"{name} gives other log-probs in {layout.name} rows than in padded ones: they differ by "
        f"{apart:.3g} nats a token, rounding explains {tolerance:g}"
    )


def token_logps(model: nn.Module, batch: Batch) -> tuple[Tensor, torch.dtype]:
    """Of the response tokens that count, response after response [N], and the type of the head's hidden states."""
    batch = on_device(batch, next(model.parameters()).device)
    labels, dtypes = batch["labels"], []

    def head_fn(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        dtypes.append(hidden.dtype)
        return linear_token_logp(hidden, weight, labels, num_rows=num_counted(batch), **head)

    logps = run_in_head(model, head_fn, **model_inputs(batch))
    return logps[labels != IGNORE], dtypes[0]


@contextmanager
def in_full_float32() -> Iterator[None]:
    """Neither TF32 nor autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
