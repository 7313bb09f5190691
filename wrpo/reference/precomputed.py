"""Reference log-probs that are computed once for whole data sets, in a table that the rows point into.

Each row carries `ref_place`, a number for each of its responses, so that the table may come when the data loader is
already there: where the policy runs in shards or in another arithmetic than before it was wrapped (FSDP, DeepSpeed),
the pass takes place through the wrapped policy, before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wrpo.data.collation import Batch
from wrpo.user_error import UserError

from .cache import ReferenceFile
from .reference import from_batch

LogpOf = Callable[[nn.Module, list[dict]], Tensor]


class Precomputed:
    """The reference log-probs of a batch, from the batch or from the table.

    Args:
        logp_of: [S] float32 of rows under a model, row after row.
        batch_size: rows in a batch of the pass.
        progress: show a progress bar.
        has_trained: whether the policy has changed since the files' fingerprints were made.
    """

    def __init__(self, logp_of: LogpOf, *, batch_size: int, progress: bool, has_trained: Callable[[], bool]):
        self.logp_of, self.batch_size, self.progress, self.has_trained = logp_of, batch_size, progress, has_trained
        self.files: list[ReferenceFile] = []
        self.values: list[np.ndarray | None] = []  # of each file, None: not computed yet
        self.table: Tensor | None = None

    def add(self, file: ReferenceFile) -> Any:
        """The data set of the file with `ref_place`; what is kept is read."""
        first = sum(int(other.counts.sum()) for other in self.files)
        places = file.by_row(np.arange(first, first + file.counts.sum()))
        self.files.append(file)
        self.values.append(file.read())
        if hasattr(file.dataset, "add_column"):
            return file.dataset.add_column("ref_place", places)
        return WithPlaces(file.dataset, places)

    def is_complete(self) -> bool:
        return all(values is not None for values in self.values)

    def fill(self, model: nn.Module) -> None:
        """Compute what was not kept, under this model. Every process must call it.

        Raises:
            UserError: the model has been trained, so it is not the reference any more.
            ValueError: a log-prob is NaN or infinite.
        """
        if not self.is_complete() and self.has_trained():
            lacking = [str(file.path) for file, values in zip(self.files, self.values, strict=True) if values is None]
            raise UserError(
                f"the reference log-probs of the model before training are not in {', '.join(lacking)}, and this run "
                "goes on from a checkpoint. Name the folder of the first run in reference_cache_dir, or start anew"
            )
        for number, file in enumerate(self.files):
            if self.values[number] is None:
                self.values[number] = file.compute(
                    lambda rows: self.logp_of(model, rows), batch_size=self.batch_size, progress=self.progress
                )

    def __call__(self, policy: nn.Module, batch: Batch) -> Tensor:
        if "ref_place" not in batch:
            return from_batch(policy, batch)
        places = batch["ref_place"]
        if self.table is None:
            self.fill(policy)
            values = [torch.from_numpy(values) for values in self.values if values is not None]
            self.table = torch.cat(values).to(places.device)
        return self.table[places]


class WithPlaces(torch.utils.data.Dataset):
    """Rows of another data set with their places in the table."""

    def __init__(self, rows: Any, places: Iterable[list[int]]):
        self.rows, self.places = rows, list(places)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], "ref_place": self.places[index]}
