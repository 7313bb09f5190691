"""A Trainer that finds out in which layout its batches stand, and sees to it that all its models agree."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback

from wrpo.data.collation import PreferenceCollator, SFTCollator, with_layout
from wrpo.data.layout import PADDED, Layout
from wrpo.head.attention import attention_forms
from wrpo.head.fused_head import find_causal_lm, install_fused_head
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

    def open_layout(self, rows: Any) -> None:
        """Choose the layout for the policy and these rows: now, or when training begins and the policy is wrapped.

        Raises:
            ValueError: the layout that was asked for cannot be had.
        """
        wanted, collator = self.args.layout, self.data_collator
        if not isinstance(collator, (PreferenceCollator, SFTCollator)):
            if wanted not in ("auto", "padded"):
                raise ValueError(
                    f"layout {wanted!r} is the work of PreferenceCollator and SFTCollator, and data_collator is "
                    f"{type(collator).__name__}: use layout auto or padded"
                )
            self.layout_choice = Choice(PADDED, "as data_collator makes it")
            return
        self.data_collator = with_layout(collator, PADDED)  # of the trainer's own; the caller's stays as it is
        if wanted == "auto" and collator.layout != PADDED:
            wanted = collator.layout.name
        if wanted == "padded" or not self.args.check_head or self.can_be_asked(self.model):
            self.choose_layout(wanted, rows, self.model)
        else:
            self.use_layout(Choice(PADDED, "until the model is wrapped"))
            self.add_callback(LayoutOnceWrapped(self, wanted, rows))

    def choose_layout(self, wanted: str, rows: Any, wrapped: nn.Module) -> None:
        """The same on every process; wrapped: what the policy runs in, by which it is asked."""
        args = self.args

        def choice() -> Choice:
            return choose_layout(
                wanted,
                self.model,
                rows,
                self.data_collator,
                batch_size=args.per_device_train_batch_size,
                sorted_by_length=args.train_sampling_strategy in BY_LENGTH,
                probe=args.check_head,
                autocast=self.accelerator.autocast,
                wrapped=wrapped,
            )

        self.use_layout(self.of_main_process(choice))

    def agree_on_layout(self, model: nn.Module, rows: Any) -> None:
        """Ask another model that will see the same batches, and go back to padded rows where it does not agree.

        Raises:
            ValueError: it does not agree on a layout that was asked for.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LayoutOnceWrapped):
                callback.others.append(model)
                return
        layout = self.layout_choice.layout
        # Blocks and bounds want the device.
        can_run = not is_partitioned(model) and (layout.attention == "mask" or self.can_be_asked(model))
        if layout == PADDED or not self.args.check_head or not can_run:
            return
        install_fused_head(model)
        layout, reason = self.of_main_process(lambda: self.layout_for_both(model, layout, probed(rows)))
        if layout is not None:
            self.use_layout(Choice(layout, self.layout_choice.reason))
        elif self.args.layout != "auto":
            raise ValueError(f"layout {self.args.layout!r}: reference: {reason}. Use layout padded, or auto")
        else:
            self.use_layout(Choice(PADDED, f"reference: {reason}"))

    def layout_for_both(self, model: nn.Module, layout: Layout, rows: list[dict]) -> tuple[Layout | None, str]:
        """The policy's layout if the other model agrees, else that by the next form of attention that both take; and
        why it is none."""
        options = self.data_collator, self.accelerator.autocast
        reason = disagreement(model, rows, options[0], layout, options[1])
        if reason is None:
            return layout, ""
        for form in forms_of(self.model):
            other = Layout(layout.name, form)
            if form != layout.attention and form in forms_of(model):
                asked = (disagreement(one, rows, options[0], other, options[1]) for one in (self.model, model))
                if all(answer is None for answer in asked):
                    return other, ""
        return None, reason

    def can_be_asked(self, model: nn.Module) -> bool:
        """Not before it is wrapped where that brings its weights together (ZeRO-3) or onto the device (FSDP)."""
        return not is_partitioned(model) and next(model.parameters()).device.type == self.args.device.type

    def use_layout(self, choice: Choice) -> None:
        """From the next batch on: a loader that is already there has the same collator."""
        self.layout_choice = choice
        self.data_collator.layout = choice.layout

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


def forms_of(model: nn.Module) -> tuple[str, ...]:
    """As `attention_forms`; none where the attention is not known."""
    try:
        return attention_forms(find_causal_lm(model))
    except ValueError:
        return ()


class LayoutOnceWrapped(TrainerCallback):
    """Chooses the layout when training begins, by asking the wrapped policy and the `others` that see its batches."""

    def __init__(self, trainer: LayoutTrainer, wanted: str, rows: Any):
        self.trainer, self.wanted, self.rows = trainer, wanted, rows
        self.others: list[nn.Module] = []

    def on_train_begin(self, *_args: Any, **_options: Any) -> None:
        trainer = self.trainer
        trainer.remove_callback(self)
        trainer.choose_layout(self.wanted, self.rows, trainer.model_wrapped)
        for model in self.others:
            trainer.agree_on_layout(model, self.rows)
