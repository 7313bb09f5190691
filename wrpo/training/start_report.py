"""What a run says at its start, in a few lines: with a warning where it is too short for its warm-up; and that it logs
at least ten times however short it is.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import TrainerCallback

from wrpo.data.lengths import lengths_of

logger = logging.getLogger("wrpo.training")

FEWEST_LINES = 10  # of the log, where the run has as many steps
SEVERAL = {"source": "sources", "target": "targets"}
SHORT = 5  # steps; of fewer the first alone is more than a fifth


class DataSize(NamedTuple):
    """How much there is to train on."""

    rows: Counter[str]  # by the roles of their responses, "source + target + rejected"
    responses: int
    prompt_tokens: int  # once for each response, as in padded rows
    response_tokens: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} of {kind}" for kind, count in self.rows.most_common(4))
        tokens = self.prompt_tokens + self.response_tokens
        share = f"{self.prompt_tokens / tokens:.0%}" if tokens else "none"
        rows = f"{self.rows.total():,} rows ({kinds}), {self.responses:,} responses"
        return f"{rows}, {tokens:,} tokens in padded rows, {share} of them prompt"


def data_size(rows: Any) -> DataSize | None:
    """Of tokenised rows; None of a stream, which nobody has gone through yet."""
    if not hasattr(rows, "__len__"):
        return None
    kinds: Counter[str] = Counter()
    responses = prompt_tokens = response_tokens = 0
    for prompt, lengths, roles in lengths_of(rows):
        kinds[_kind(roles)] += 1
        responses += len(lengths)
        prompt_tokens += prompt * len(lengths)
        response_tokens += sum(lengths)
    return DataSize(kinds, responses, prompt_tokens, response_tokens)


def _kind(roles: list[str]) -> str:
    """What is in a row. Of a pair the target's answer is what everybody calls the chosen one."""
    is_pair = {*roles} == {"target", "rejected"}
    names = ["chosen" if is_pair and role == "target" else role for role in roles]
    return " + ".join(f"{n} {SEVERAL.get(name, name)}" if n > 1 else name for name, n in Counter(names).items())


class StartReport(TrainerCallback):
    """Prints the lines on the main process when training begins, and sees to the log.

    Args:
        lines: what to say, given the number of optimizer steps.
    """

    def __init__(self, lines: Callable[[int], list[str]]):
        self.lines = lines

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **_: Any) -> None:
        state.logging_steps = max(1, min(state.logging_steps, state.max_steps // FEWEST_LINES))
        if state.is_world_process_zero:
            tqdm.write("\n".join(self.lines(state.max_steps)), file=sys.stderr)  # above a bar, not into it
            if not state.global_step:
                warn_of_warm_up(args, state.max_steps, [group["lr"] for group in optimizer.param_groups])
            elif state.global_step >= state.max_steps:
                logger.warning(
                    "Nothing is left to train: the checkpoint is at step %d of %d", state.global_step, state.max_steps
                )


def warn_of_warm_up(args: Any, steps: int, rates: list[float]) -> None:
    """Where the learning rate begins at 0 and the run ends before it has grown, or soon after.

    Args:
        steps: of the run.
        rates: the learning rates of the first step.
    """
    warm_up = args.get_warmup_steps(steps)
    if args.learning_rate and not any(rates) and (warm_up >= steps or steps < SHORT):
        logger.warning(
            "This run trains little or nothing: the learning rate is 0 in its first step, and the warm-up takes %d of "
            "its %d steps. Set warmup_steps to 0, or train for more steps.", warm_up, steps,
        )  # fmt: skip
