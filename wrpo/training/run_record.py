"""What a run is made of, kept with each of its checkpoints, and compared where a run goes on from one.

    {"settings": "DPOConfig", "optimizer": "torch.optim.adamw.AdamW", "model": hash, "data": "800 rows, hash",
     "beta": 0.1, "seed": 42, ...}

Transformers keeps a checkpoint's weights and state, and takes them up under whatever settings the next run has. Here
what makes another loss or another order of the data is said, and state that does not fit is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import Trainer

from wrpo.data.fingerprint import data_fingerprint
from wrpo.user_error import UserError

logger = logging.getLogger("wrpo.training")

FILE = "wrpo_run.json"  # in a checkpoint
OF_THE_LOSS = ("training", "loss", "reference", "data")  # groups of our own fields
OTHERWISE = ("resume_from_checkpoint", "reference_cache_dir", "remove_unused_columns")  # in them, and change no number
INHERITED = ("seed", "data_seed", "max_steps", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip",
             "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
             "lr_scheduler_kwargs", "neftune_noise_alpha", "bf16", "fp16", "world_size")  # fmt: skip
# What a checkpoint's state belongs to, and what to do where this run has another.
OF_THE_STATE = {
    "settings": "Go on with the command, or the class of settings, that it was made with",
    "optimizer": "Go on with the optimizer that it was made with",
    "trained": "Train the same parameters: all of them, or an adapter of the same size on the same modules",
    "model": "Go on with the model, in the torch_dtype, that the run began with: its reference and frozen weights are "
    "not in the checkpoint",
    "sync_ref_model": "Leave it as it was: a reference that has moved is in the checkpoint",
}
# Kept in the optimizer's state, which wins over the settings of the run that goes on.
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
TO_DO_INSTEAD = "Or start a new run from the model in the checkpoint"
LONGEST = 60  # characters of a value in a message


def record_of(trainer: Any) -> dict[str, Any]:
    """Of a trainer that knows what it `began_with`."""
    args = trainer.args
    fields = {field.name: field.metadata.get("group") for field in dataclasses.fields(args)}
    names = [name for name, group in fields.items() if group in OF_THE_LOSS and name not in OTHERWISE]
    settings = {name: getattr(args, name) for name in (*names, *INHERITED) if hasattr(args, name)}
    record = {
        "settings": type(args).__name__,
        "optimizer": _optimizer_of(trainer),
        **trainer.began_with,
        "data": data_fingerprint(trainer.train_dataset),
        **trainer.reference_facts(),
        **settings,
    }
    return json.loads(json.dumps(record, default=_as_json, skipkeys=True))


def _optimizer_of(trainer: Any) -> str:
    own = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in accelerate's wrapper after a first run
    kind: Any = type(own)
    if own is None:
        chosen = trainer.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        kind = chosen[0]
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def write_record(record: dict[str, Any], checkpoint: Path) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """None: there is none that can be read."""
    try:
        record = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def compare(kept: dict[str, Any] | None, record: dict[str, Any], checkpoint: str) -> None:
    """Says in one line of the log what differs, each by its name: then -> now; and in one what does not, though it was
    set, for the optimizer's state has it.

    Args:
        kept: what was read beside the checkpoint.
        record: of the run that goes on from it. A field that one of the two lacks is null there.

    Raises:
        UserError: the checkpoint's state is of another kind of run, or of another model.
    """
    if kept is None:
        logger.warning(
            "%s has no %s: whether the settings of its run are those of this one is not known", checkpoint, FILE
        )
        return
    both = {name: (_text(kept.get(name)), _text(record.get(name))) for name in {**kept, **record}}
    other = {name: texts for name, texts in both.items() if texts[0] != texts[1]}
    for name, todo in OF_THE_STATE.items():
        if name in other and name in kept:
            then, now = map(_short, other[name])
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} is of another run: {name} {then} then, {now} now. {todo}. "
                f"{TO_DO_INSTEAD}"
            )
    stay = [f"{name} {other[name][0]}, not {other[name][1]}" for name in OF_THE_OPTIMIZER if name in other]
    if stay:
        logger.warning("%s goes on with what its optimizer's state holds: %s", checkpoint, ", ".join(stay))
    changes = [f"{n}: {_short(a)} -> {_short(b)}" for n, (a, b) in other.items() if n not in OF_THE_OPTIMIZER]
    if changes:
        logger.warning("%s goes on otherwise than it began: %s", checkpoint, ", ".join(changes))


def _text(value: Any) -> str:
    """Equal for equal values, NaN too, and for a field that is absent or null."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
