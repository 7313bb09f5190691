"""Every field of `transformers.TrainingArguments`: it works, is refused here with its reason, or is of no use here.

The trainers have no logits, no cross-entropy, and a loss in the model's head; a few fields are about those. A field
that would be ignored in silence is refused, unless ignoring it changes nothing that anybody could miss (`OF_NO_USE`).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from multiprocessing import get_all_start_methods
from typing import Any

import torch
from transformers import SchedulerType
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from wrpo.settings import check_choice, check_range

LARGEST_SEED = 2**32 - 1  # NumPy takes no larger one
AT_LEAST_0 = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs", "eval_delay",
              "dataloader_num_workers", "eval_steps", "save_total_limit", "neftune_noise_alpha")  # fmt: skip
AT_LEAST_1 = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "ddp_timeout",
              "eval_accumulation_steps", "dataloader_prefetch_factor")  # fmt: skip
ABOVE_0 = ("logging_steps", "save_steps")
OPTIONAL = ("max_grad_norm", "eval_steps", "save_total_limit", "neftune_noise_alpha", "eval_accumulation_steps",
            "dataloader_prefetch_factor", "data_seed")  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "lr_scheduler_type": tuple(kind.value for kind in SchedulerType),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "dataloader_multiprocessing_context": tuple(get_all_start_methods()),
    "log_level": tuple(trainer_log_levels),
    "log_level_replica": tuple(trainer_log_levels),
}

# Field: (the one value that it can have, why).
FIXED: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "the collator reads columns that the model does not"),
    "label_smoothing_factor": (
        0.0,
        "it smooths the tokens of a cross-entropy, which no loss here has (the smoothing of preferences is "
        "loss_label_smoothing)",
    ),
    "average_tokens_across_devices": (True, "the loss of a step is the mean over the items of all devices, always"),
    "bf16_full_eval": (False, "it rounds the weights themselves, and so what is saved; bf16: true evaluates without"),
    "fp16_full_eval": (False, "it rounds the weights themselves, and so what is saved; fp16: true evaluates without"),
    "include_for_metrics": ([], "it is for compute_metrics, which needs logits, and they never exist here"),
    "batch_eval_metrics": (False, "it is for compute_metrics, which needs logits, and they never exist here"),
    "use_liger_kernel": (
        False,
        "it takes the model's forward, and with it the fused head, off the model. Its layers go with it: call Liger's "
        "apply_liger_kernel_to_...(fused_linear_cross_entropy=False) before the model is loaded",
    ),
    "liger_kernel_config": (None, "it is for use_liger_kernel"),
}

# Field: why any value of it gives the same run.
OF_NO_USE: dict[str, str] = {
    "prediction_loss_only": "an evaluation makes the values of the log and nothing else",
    "eval_do_concat_batches": "an evaluation gathers no predictions",
    "eval_use_gather_object": "an evaluation gathers no predictions",
    "eval_accumulation_steps": "an evaluation gathers no predictions",
    "label_names": "the collator makes the labels",
    "length_column_name": "lengths are counted in the tokens",
    "do_train": "is for scripts of one's own",
    "do_eval": "is for scripts of one's own",
    "do_predict": "is for scripts of one's own",
    "local_rank": "torchrun says it in the environment",
}


def check_inherited(args: Any) -> None:
    """Before `TrainingArguments` looks at them. Raises ValueError: it takes most values as they come, and the run would
    fail later, end in NaN, or go another way than was asked.
    """
    check_numbers(args, *_there(args, AT_LEAST_0), low=0)
    check_numbers(args, *_there(args, AT_LEAST_1), low=1)
    check_numbers(args, *_there(args, ABOVE_0), low=0, open_low=True)
    check_numbers(args, "max_steps", low=-1)
    check_numbers(args, "seed", "data_seed", low=0, high=LARGEST_SEED)
    for name in _there(args, CHOICES):
        if isinstance(value := getattr(args, name), str):
            check_choice(name, value, CHOICES[name])
    check_words(args)
    for name in _there(args, FIXED):
        only, reason = FIXED[name]
        if getattr(args, name) not in (only, None):
            raise ValueError(f"{name} must be {only}: {reason}")
    refuse_cut_sequences(args)
    for words, holds in _contradictions(args).items():
        if holds:
            raise ValueError(words)


def check_words(args: Any) -> None:
    """Raises ValueError where text is none of the words that a field knows, which only a later import or step says."""
    for word in args.debug.split() if isinstance(args.debug, str) else ():
        check_choice("debug", word, [option.value for option in DebugOption])
    reports = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for word in reports:
        check_choice("report_to", word, ["all", "none", *INTEGRATION_TO_CALLBACK])
    if args.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # a second of imports

        check_choice("torch_compile_mode", args.torch_compile_mode, [*list_mode_options()])
    if args.torch_compile_backend is not None:
        check_choice("torch_compile_backend", args.torch_compile_backend, torch.compiler.list_backends(()))
    config = args.accelerator_config
    if isinstance(config, str) and not config.lstrip().startswith("{") and not os.path.isfile(config):
        raise ValueError(f"accelerator_config: expected a mapping or a JSON file of one, got {config!r}")


def refuse_cut_sequences(args: Any) -> None:
    """Raises ValueError: each process would make the loss of a part of a response against the reference of all of it.

    accelerate launch says its settings in the environment.
    """
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    for name, kind in (("cp_size", "context"), ("sp_size", "sequence")):
        of_launch = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") if launched else None
        size = int(getattr(getattr(args, "parallelism_config", None), name, None) or of_launch or 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config: {name} must be 1, got {size}: {kind} parallelism cuts the responses whose "
                "log-probs are summed here. Long rows want gradient_checkpointing and FSDP2"
            )


def check_numbers(args: Any, *names: str, **bounds: Any) -> None:
    """As `check_range`, but None passes in `OPTIONAL` alone, whatever the fields' types say.

    Raises:
        ValueError: with the field, what was expected and what came.
    """
    for name in names:
        if getattr(args, name) is not None:
            check_range(args, name, **bounds)
        elif name not in OPTIONAL:
            raise ValueError(f"{name}: expected a finite number, got none")


def _there(args: Any, names: Any) -> list[str]:
    """Releases of transformers differ in their fields."""
    return [name for name in names if hasattr(args, name)]


def _contradictions(args: Any) -> dict[str, bool]:
    workers, targets = args.dataloader_num_workers, args.optim_target_modules
    kind = str(getattr(args.optim, "value", args.optim))
    return {
        "dataloader_persistent_workers needs dataloader_num_workers above 0": (
            args.dataloader_persistent_workers and not workers
        ),
        "dataloader_multiprocessing_context needs dataloader_num_workers above 0": (
            getattr(args, "dataloader_multiprocessing_context", None) is not None and not workers
        ),
        f"optim_target_modules is for the optimizers galore, apollo and their like, got optim {kind!r}": (
            targets is not None and not kind.startswith(("galore", "apollo"))
        ),
        "ddp_backend is for several processes: start them with torchrun or accelerate launch": (
            args.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1
        ),
        "parallelism_config: expected accelerate's ParallelismConfig, or the one of accelerate launch, got text": (
            isinstance(getattr(args, "parallelism_config", None), str)
        ),
        f"deepspeed {args.deepspeed!r}: needs the package deepspeed: pip install deepspeed": (
            bool(args.deepspeed) and find_spec("deepspeed") is None
        ),
    }


def settle_inherited(args: Any) -> None:
    """After `TrainingArguments` has read its fields: gradients are not clipped where `max_grad_norm` is None, and no
    process deals out parts of another's batches.

    accelerate does that with streams unless told otherwise, and cuts every tensor of a batch by rows; a batch here
    holds as many sequences as its rows have responses.

    Raises:
        ValueError: `accelerator_config` asks for it.
    """
    if args.max_grad_norm is None:
        args.max_grad_norm = 0.0
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches must be false: a batch of rows with several responses cannot be cut"
        )
    args.accelerator_config.dispatch_batches = False


def describe() -> str:
    """What is refused and what is of no use, for the end of a command's --help."""
    lines = ["of transformers.TrainingArguments, refused:"]
    lines += [f"  {name} other than {value}: {reason}" for name, (value, reason) in FIXED.items()]
    lines += ["of transformers.TrainingArguments, of no use here:"]
    lines += [f"  {name}: {reason}" for name, reason in OF_NO_USE.items()]
    return "\n".join(lines)
