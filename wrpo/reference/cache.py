"""Reference log-probs of a whole data set, computed once and kept on disk.

The file holds the log-probs of all responses, row after row, and the fingerprint of what
they were made from: the token ids, the model's weights, the tokenizer and the settings. A file made from anything else
is computed again, with a warning that says what changed; so is one that cannot be read or whose numbers were altered.

Rows are gone through longest first, so that a batch holds little padding and memory runs out at once or never; the
data's own order stays. Each rank takes its share of the batches.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm.auto import tqdm

from wrpo.data.ranks import data_rank

from .fingerprint import refuse_unequal

logger = logging.getLogger("wrpo.reference")


class ReferenceFile:
    """The reference log-probs of one data set, and the file that keeps them. Every process must make each call.

    Args:
        dataset: rows as `tokenize_examples` makes them; a `datasets.Dataset`, or anything with length and index.
        path: where the log-probs are kept.
        fingerprint: what they are made from besides the data, see `wrpo.reference.fingerprint`.
        accelerator: of the trainer; shares the work out and gathers it.
        weights_of_first: whether all processes will run with the weights of the first one, whatever theirs are now.
            Default: False.

    Raises:
        ValueError: a process has other weights or data.
    """

    def __init__(
        self,
        dataset: Any,
        path: Path,
        fingerprint: dict[str, str],
        accelerator: Any,
        weights_of_first: bool = False,
    ):
        self.dataset, self.path, self.accelerator = dataset, path, accelerator
        self.lengths, self.counts, data = survey(dataset)
        fingerprints = gather_object([{"data": data, **fingerprint}])
        refuse_unequal(fingerprints, but="model" if weights_of_first else None)
        self.fingerprint = fingerprints[0]

    def read(self) -> np.ndarray | None:
        """[all responses] float32, what is kept and was made from the same; None: nothing is."""
        values = load(self.path, self.fingerprint) if self.accelerator.is_main_process else None
        (values,) = broadcast_object_list([values])
        return values

    def compute(self, logp_of: Callable[[list[dict]], Tensor], *, batch_size: int, progress: bool) -> np.ndarray:
        """[all responses] float32, which are kept then.

        Args:
            logp_of: [S] float32 of the rows of one batch, row after row.
            batch_size: rows in a batch.
            progress: show a progress bar on the main process.

        Raises:
            ValueError: a log-prob is NaN or infinite; nothing is kept.
        """
        values = compute(self.dataset, self.lengths, self.counts, logp_of, batch_size, self.accelerator, progress)
        refuse_not_finite(values, self.counts)
        if self.accelerator.is_main_process:
            save(self.path, self.fingerprint, values)
        return values

    def by_row(self, values: Any) -> list[list[Any]]:
        """A list for each row, of as many values as it has responses."""
        return [part.tolist() for part in np.split(values, np.cumsum(self.counts)[:-1])]


def survey(dataset: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """Tokens of each row's longest sequence, its number of responses, and the hash of all token ids."""
    digest, lengths, counts = hashlib.sha256(), [], []
    for row in (dataset[index] for index in range(len(dataset))):
        parts = [row["prompt_ids"], *row["response_ids"]]
        lengths.append(len(parts[0]) + max(map(len, parts[1:])))
        counts.append(len(parts) - 1)
        digest.update(np.array([len(part) for part in parts], dtype=np.int64).tobytes())
        digest.update(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]).tobytes())
    return np.array(lengths), np.array(counts), digest.hexdigest()


def compute(
    dataset: Any,
    lengths: np.ndarray,
    counts: np.ndarray,
    logp_of: Callable[[list[dict]], Tensor],
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> np.ndarray:
    """Log-probs of all responses, row after row, float32."""
    first = np.cumsum(counts) - counts
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)]
    total = torch.zeros(int(counts.sum()), dtype=torch.float32, device=accelerator.device)
    # Weights that are spread over processes are gathered by all of them together, so each runs them equally often.
    index, ranks = data_rank(accelerator)
    rounds = range(index, -(-len(batches) // ranks) * ranks, ranks)
    for turn in tqdm(rounds, desc="Reference log-probs", disable=not (progress and accelerator.is_main_process)):
        indices = batches[turn % len(batches)]
        logp = logp_of([dataset[index] for index in indices])  # [S]
        if turn < len(batches):
            for index, own in zip(indices, logp.split(counts[indices].tolist()), strict=True):
                total[first[index] : first[index] + counts[index]] = own
    if accelerator.process_index % (accelerator.num_processes // ranks):  # another one has the same rows
        total.zero_()
    return accelerator.reduce(total, "sum").cpu().numpy()


def refuse_not_finite(values: np.ndarray, counts: np.ndarray) -> None:
    """Raises ValueError naming the first row with a log-prob that is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(np.searchsorted(np.cumsum(counts), bad[0], side="right"))
        raise ValueError(
            f"the reference log-probs of {len(bad)} responses are not finite, the first in row {row} (counted from 0): "
            f"{values[bad[0]]}. Check the weights of the reference model, and use bf16 or float32 where fp16 overflows"
        )


def load(cache_file: Path, fingerprint: dict[str, str]) -> np.ndarray | None:
    """What is kept, if it was made from the same; None with a warning if not; None in silence if there is no file."""
    if not cache_file.exists():
        return None
    try:
        with safe_open(cache_file, framework="np") as file:
            kept = dict(file.metadata() or {})
            values = file.get_tensor("ref_logp")
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s): computing the reference log-probs again", cache_file, error)
        return None
    if kept.pop("values", None) != hashlib.sha256(values.tobytes()).hexdigest():
        logger.warning("%s is damaged: its numbers are not those that were written. Computing them again", cache_file)
        return None
    changed = [name for name in fingerprint if kept.get(name) != fingerprint[name]]
    if changed:
        logger.warning(
            "%s was made from another %s: computing the reference log-probs again", cache_file, ", ".join(changed)
        )
        return None
    logger.info("reference log-probs read from %s", cache_file)
    return values


def save(cache_file: Path, fingerprint: dict[str, str], values: np.ndarray) -> None:
    """Written beside and moved into place, so that a reader never sees half a file."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    partial = cache_file.with_suffix(f".{os.getpid()}.partial")
    metadata = {**fingerprint, "values": hashlib.sha256(values.tobytes()).hexdigest()}
    save_file({"ref_logp": values}, partial, metadata=metadata)
    os.replace(partial, cache_file)
