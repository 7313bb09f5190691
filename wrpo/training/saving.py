"""A model that was trained is saved, in files that load everywhere.

What would prevent it is met before training. Weights that are spread over processes are put together on the first one.
If saving fails all the same, the weights are left as a state dict, and the message says where.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from wrpo.user_error import UserError, in_one_line

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME, *ADAPTER)
RESCUED = "weights_of_a_failed_save.pt"


class SavingTrainer(Trainer):
    """A Trainer that saves an adapter's generation settings with it, and does not lose weights that it cannot save."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, also where checkpoints are kept in shards. Every process must call it.

        Raises:
            UserError: no weights were written.
        """
        if _internal_call:  # a checkpoint
            return super().save_model(output_dir, _internal_call=True)
        folder = Path(output_dir or self.args.output_dir)
        before = written(folder)
        with self._weights_put_together():
            super().save_model(output_dir)
        if self.args.should_save and written(folder) == before:
            raise UserError(
                f"saving has written no weights to {folder}: they are spread over processes in a way that is not known "
                "here. Checkpoints in it hold them"
            )

    @contextmanager
    def _weights_put_together(self) -> Iterator[None]:
        """transformers writes no model of FSDP's sharded state dicts, nor under ZeRO-3 unless its config says so."""
        if self.is_fsdp_enabled:
            from torch.distributed.fsdp import StateDictType

            settings, name, value = self.accelerator.state.fsdp_plugin, "state_dict_type", StateDictType.FULL_STATE_DICT
        elif self.is_deepspeed_enabled and self.deepspeed is not None:
            settings, name, value = self.deepspeed._config.zero_config, "gather_16bit_weights_on_model_save", True
        else:
            yield
            return
        kept = getattr(settings, name)
        setattr(settings, name, value)
        try:
            yield
        finally:
            setattr(settings, name, kept)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        try:
            super()._save(str(folder), state_dict)
            if self.args.should_save:
                save_settings(self.model, folder)
        except Exception as error:
            if not self.args.should_save:
                raise
            weights = trained_weights(self.model) if state_dict is None else state_dict
            place = rescue(weights, folder)
            if place is None:
                raise
            raise UserError(
                f"{folder} could not be saved: {in_one_line(error)}. The weights are in {place}: "
                f"model.load_state_dict(torch.load({str(place)!r}), strict=False)"
            ) from error


def save_settings(model: Any, folder: Path) -> None:
    """What saving leaves out of an adapter's folder: how the adapted model generates."""
    if hasattr(model, "get_base_model"):
        config = getattr(model.get_base_model(), "generation_config", None)
        if config is not None:
            config.save_pretrained(folder)


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Of an adapted model, what is trained; of any other, all of it."""
    if getattr(model, "peft_config", None):
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return model.state_dict()


def rescue(weights: dict[str, Tensor], folder: Path) -> Path | None:
    """The file that the weights are in now, in `folder` or else in a new temporary folder; None: in neither."""
    for find in (lambda: folder, lambda: Path(tempfile.mkdtemp(prefix="wrpo-"))):
        with suppress(OSError, RuntimeError):  # a full disk, in the words of Python or of torch
            place = find() / RESCUED
            try:
                torch.save(weights, place)
                return place
            except BaseException:
                place.unlink(missing_ok=True)
                raise
    return None


def refuse_unsaveable(trainer: Trainer) -> None:
    """Save everything but the weights, and throw it away.

    Raises:
        ValueError: something that cannot be written.  OSError: an output folder that cannot be.
    """
    if not trainer.args.should_save:
        return
    model: Any = trainer.model
    is_adapted = hasattr(model, "get_base_model")
    base = model.get_base_model() if is_adapted else model
    parts = {
        "config": None if is_adapted else getattr(base, "config", None),
        "generation_config": getattr(base, "generation_config", None),
        "tokenizer": trainer.processing_class,
    }
    Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=trainer.args.output_dir, prefix="can_be_saved-") as folder:
        for name, part in parts.items():
            if part is not None:
                with _refused(name):
                    part.save_pretrained(folder)
        with _refused("settings"):
            torch.save(trainer.args, Path(folder) / "training_args.bin")


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: cannot be saved, so nothing is trained: {in_one_line(error)}") from error


def written(folder: Path) -> dict[str, int]:
    """The files of weights there, and when each was written, in ns."""
    return {name: (folder / name).stat().st_mtime_ns for name in WEIGHTS if (folder / name).exists()}
