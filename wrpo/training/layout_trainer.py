"""A Trainer that finds out in which layout its batches stand, and sees to it that all its models agree."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer

from wrpo.data.collation import with_layout
from wrpo.data.layout import PADDED
from wrpo.head.fused_head import install_fused_head
from wrpo.head.wrapping import is_partitioned
from wrpo.layouts import Choice, choose_layout
from wrpo.layouts.choice import probed
from wrpo.layouts.probe import disagreement

from .length_groups import BY_LENGTH


class LayoutTrainer(Trainer):
    """Holds `layout_choice`, and gives its layout to the collator."""

    args: Any
    data_collator: Any
    layout_choice: Choice

    def choose_layout(self, rows: Any) -> None:
        """For the policy and these rows, as the settings want it; the same on every process.

        Raises:
            ValueError: the layout that was asked for cannot be had.
        """
        args, collator = self.args, self.data_collator
        if not hasattr(collator, "layout"):
            if args.layout not in ("auto", "padded"):
                raise ValueError(
                    f"layout {args.layout!r} is the work of PreferenceCollator and SFTCollator, and data_collator is "
                    f"{type(collator).__name__}: use layout auto or padded"
                )
            self.layout_choice = Choice(PADDED, "as data_collator makes it")
            return

        def choice() -> Choice:
            return choose_layout(
                args.layout,
                self.model,
                rows,
                collator,
                batch_size=args.per_device_train_batch_size,
                sorted_by_length=args.train_sampling_strategy in BY_LENGTH,
                probe=self.can_be_asked(self.model),
                autocast=self.accelerator.autocast,
            )

        self.use_layout(self.of_main_process(choice))

    def agree_on_layout(self, model: nn.Module, rows: Any) -> None:
        """Ask another model that will see the same batches, and go back to padded rows where it does not agree.

        Raises:
            ValueError: it does not agree on a layout that was asked for.
        """
        layout = self.layout_choice.layout
        if layout == PADDED or not self.can_be_asked(model):
            return
        install_fused_head(model)
        collator, autocast = self.data_collator, self.accelerator.autocast
        reason = self.of_main_process(lambda: disagreement(model, probed(rows), collator, layout, autocast))
        if reason is not None and self.args.layout != "auto":
            raise ValueError(f"layout {layout.name!r}: reference: {reason}. Use layout padded, or auto")
        if reason is not None:
            self.use_layout(Choice(PADDED, f"reference: {reason}"))

    def can_be_asked(self, model: nn.Module) -> bool:
        """Not before it is wrapped where that brings its weights together (ZeRO-3) or onto the device (FSDP)."""
        is_there = not is_partitioned(model) and next(model.parameters()).device.type == self.args.device.type
        return self.args.check_head and is_there

    def use_layout(self, choice: Choice) -> None:
        self.layout_choice = choice
        self.data_collator = with_layout(self.data_collator, choice.layout)

    def of_main_process(self, compute: Any) -> Any:
        """What the main process computed, or its error. All compute it: weights may be spread over them."""
        result, own_error = None, None
        try:
            result = compute()
        except ValueError as error:
            own_error = error
        result, words = broadcast_object_list([result, own_error and str(own_error)])
        if words is not None:
            raise own_error or ValueError(words)
        return result
