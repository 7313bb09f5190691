"""How well the policy tells each source model's answers, and the target's, from the rejected ones; what follows it.

Over all rows of an optimizer step, on all ranks and in all micro-batches, each source model's answers are measured by

    margin      r(source) - r(rejected)
    accuracy    1 where r(source) > r(rejected), else 0

and the target's the same. The running mean of a measure is a mean over rows in which a row of n steps ago counts
decay^n: A / N with, after every step,

    A <- decay * A + sum of the step's values        N <- decay * N + number of the step's rows

Two weights may follow it. Both are settled between two optimizer steps, so all micro-batches and ranks of one step see
the same, and both are computed on the device: it is waited for where a line is logged or a checkpoint written only.

    shares   q_k = w_k exp(s_k / temperature) / sum_j w_j exp(s_j / temperature)     of a row's sources, with w_k the
             row's own share of source k and s_k the running mean of the model that gave it
    alpha    `wrpo.training.schedule.adaptive_alpha` of the target's running accuracy

r(rejected) is that of the row's rejected ones by their shares. The shares of a row's sources sum to 1: where no row has
more than one there is nothing to share, which is said once.
A model without a row yet has the mean over all rows, so its share is that of an average one; before the first step all
means are 0, and the shares those of the rows. Source: ours; the temperature form follows FuseRL, arXiv:2504.06562.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from wrpo.data.batch import row_of
from wrpo.data.collation import Batch
from wrpo.data.roles import Role, model_names

from .response_weights import shares_by_score, sum_by_row

logger = logging.getLogger("wrpo.training.source_performance")

Measure = Literal["margin", "accuracy"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


class RunningPerformance(TrainerCallback, ExportableState):
    """The running means, as a callback that closes each optimizer step and travels with the checkpoint.

    Args:
        source_models: names of the source models in the order of the batch's `source_id`; may be empty.
        measure: "margin" or "accuracy", which the shares follow.
        temperature: of the shares, in units of the measure, > 0.
        decay: what a row counts one step later, in [0, 1).
    """

    def __init__(self, source_models: list[str], measure: Measure, temperature: float, decay: float):
        self.source_models, self.measure, self.temperature, self.decay = source_models, measure, temperature, decay
        # A row for each source model, for all unnamed ones and for the target; columns are MEASURES and number of rows.
        self.sums = torch.zeros(len(source_models) + 2, len(MEASURES) + 1, dtype=torch.float64)
        self.step_sums = torch.zeros_like(self.sums)  # of the present step, on this rank

    def add(self, reward: Tensor, batch: Batch, weight: Tensor) -> None:
        """Count a micro-batch.

        Args:
            reward: [S] float32, of each response.
            batch: with `num_responses`, `role`, `share` and, where source models are named, `source_id` [S].
            weight: [B]; 0 leaves a row out, whatever its rewards.
        """
        role, row = batch["role"], row_of(batch)
        reward = torch.where(weight[row] > 0, reward, 0.0).double()
        rejected = sum_by_row(torch.where(role == Role.REJECTED, batch["share"] * reward, 0.0), batch)
        margin = reward - rejected[row]  # [S]
        values = torch.stack([margin, (margin > 0).double(), torch.ones_like(margin)], -1) * (weight[row, None] > 0)
        unnamed = torch.full_like(role, len(self.source_models))
        place = torch.where(role == Role.SOURCE, batch["source_id"] if self.source_models else unnamed, unnamed + 1)
        place = torch.where(role == Role.REJECTED, -1, place)  # in no row of the sums
        member = place == torch.arange(len(self.sums), device=place.device)[:, None]  # [rows of the sums, S]
        self.step_sums = self.step_sums.to(margin.device) + member.double() @ values

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sums = self.decay * self.sums.to(self.step_sums.device) + reduce(self.step_sums, "sum")
        self.step_sums = torch.zeros_like(self.sums)

    def source_means(self) -> Tensor:
        """[M + 1] float64, the running mean of each source model and, last, of models without a name here."""
        values, rows = self.sums[:-1, MEASURES.index(self.measure)], self.sums[:-1, -1]
        overall = torch.where(rows.sum() > 0, values.sum() / rows.sum(), 0.0)
        return torch.where(rows > 0, values / rows, overall)

    def target_accuracy(self) -> Tensor:
        """[] float64, the target's running accuracy; 0 before the first step."""
        right, rows = self.sums[-1, MEASURES.index("accuracy")], self.sums[-1, -1]
        return torch.where(rows > 0, right / rows, 0.0)

    def shares(self, batch: Batch) -> Tensor:
        """[S] float32, the shares of a batch's responses, those of its sources as they have performed.

        Raises:
            ValueError: the batch does not name the models of its answers.
        """
        if "source_id" not in batch:
            raise ValueError(
                f"source_weighting={self.measure!r}: the batch has no source_id; give PreferenceCollator source_models"
            )
        score = (self.source_means() / self.temperature).to(batch["source_id"].device)
        return shares_by_score(batch, score[batch["source_id"]])

    def logged(self) -> dict[str, float]:
        """Each source model's running mean, and the share that an answer of it has beside one of every other model."""
        means = self.source_means()[:-1]
        shares = (means / self.temperature).softmax(0)
        return {
            f"source_{what}/{name}": value
            for what, values in ((self.measure, means), ("weight", shares))
            for name, value in zip(self.source_models, values.tolist(), strict=True)
        }

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint keeps in trainer_state.json; its floats are read back bit by bit."""
        args = {name: getattr(self, name) for name in ("source_models", "measure", "temperature", "decay")}
        return {"args": args, "attributes": {"kept_sums": self.sums.tolist()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up what the checkpoint kept, by the names of the models; a run from the start begins with nothing."""
        name = type(self).__name__
        kept = state.stateful_callbacks.get(name) if state.global_step else None
        self.sums = torch.zeros_like(self.sums, device=args.device)
        self.step_sums = torch.zeros_like(self.sums)
        if kept is not None:
            *of_models, unnamed, target = kept["attributes"]["kept_sums"]
            rows = dict(zip(kept["args"]["source_models"], of_models, strict=True))
            own = [rows.get(model, [0.0] * self.sums.shape[1]) for model in self.source_models]
            self.sums += torch.tensor([*own, unnamed, target], dtype=torch.float64).to(args.device)
        elif state.global_step:
            logger.warning("The checkpoint has no running means of the sources: they begin anew")
        state.stateful_callbacks[name] = self.state()


def source_models_of(dataset: Any) -> list[str]:
    """The names of all source models of a data set, sorted: the same numbers for the same data on every rank.

    Warns if no row has more than one source answer.

    Raises:
        ValueError: the data has no length, so it cannot be gone through before training.
    """
    if dataset is None:
        return []
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "source_weighting margin and accuracy go through train_dataset for the names of its source models, and "
            "this one has no length; use source_weighting rows or reward"
        )
    rows: Iterable[dict] = (dataset[index] for index in range(len(dataset)))
    if hasattr(dataset, "select_columns"):  # without reading the tokens
        columns = [name for name in ("role", "model") if name in dataset.column_names]
        rows = dataset.select_columns(columns)
    names: set[str] = set()
    most = 0
    for row in rows:
        own = [name for name in model_names(row) if name is not None]
        names.update(own)
        most = max(most, len(own))
    if most <= 1:
        logger.warning("No row has more than one source answer, whose share is 1 whatever source_weighting says")
    return sorted(names)
