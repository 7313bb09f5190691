"""The command `wrpo`.

    wrpo train CONFIG.yaml [--field value ...]     preference optimisation on triples
    wrpo sft CONFIG.yaml [--field value ...]       the stage before it, on the source answers
    wrpo sample SOURCES.yaml PROMPTS ... -o FILE   answers of any number of models to the same prompts
    wrpo score CANDIDATES ... -o FILE              their rewards: a reward model, a judge or a verifier
    wrpo build CANDIDATES ... -o FOLDER            SFT split and triples from scored candidate answers
    wrpo logp TRIPLES ... -o FILE --models ...     the source models' own log-probs, for a fused reference
    wrpo eval [ANSWERS...] -o FOLDER               solved prompts, wins, implicit-reward accuracy on held-out data
    wrpo info                                      versions, and which kernels run here

`wrpo COMMAND --help` lists the rest. Exit status: 0 done; 2 something the user can put right, said in one line; 3
(sample, score) done but for what the summary lists, and the same command tries that again; 130 stopped by Ctrl-C; a
traceback is a bug.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrpo.user_error import UserError

# Everything heavy is imported where it is used, so that `wrpo --help` and a mistyped command answer at once.
if TYPE_CHECKING:
    from wrpo.settings import DataSettings, ModelSettings

logger = logging.getLogger("wrpo")

EXTRAS = dict.fromkeys(("accelerate", "datasets", "transformers", "yaml"), "train") | {"openai": "sample"}
ENDINGS = {"model": "", "metrics": "metrics.json", "curves": "training_curves.png"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # answers and paths hold more than some terminals can show
    prog = f"wrpo {arguments[0]}" if arguments and arguments[0] in COMMANDS else "wrpo"
    try:
        return _flushed(_run, arguments)
    except UserError as error:
        return _user_error(prog, str(error))
    except FileNotFoundError as error:
        return _user_error(prog, f"{error.filename}: no such file" if error.filename else str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _user_error(prog, f"needs the package {error.name}: pip install 'wrpo[{EXTRAS[error.name]}]'")
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not _cannot_be_written(error):
            raise
        status = _user_error(prog, f"cannot be read or written: {error}")
        _leave_stdout()
        return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}; {hint}")
    _log_to_stderr()
    return COMMANDS[name](rest) or 0


def _flushed(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """What was printed is out, or that is an error of this command and not one of Python's exit."""
    try:
        status = run(arguments)
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _cannot_be_written(error: Exception) -> bool:
    """A full disk or a read-only folder, in the words of Python, of safetensors or of torch.save."""
    is_tensors = type(error).__name__ == "SafetensorError"
    return isinstance(error, OSError) or is_tensors or "PytorchStreamWriter" in str(error)


def _leave_stdout() -> None:
    """Where it is stdout that cannot be written, Python would try again at its exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _user_error(prog: str, message: str) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _is_first_process() -> bool:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not value.removeprefix("-").isdecimal():
            raise UserError(f"{name}: expected a whole number, got {value!r}. torchrun sets it; without it, unset it")
    return int(os.environ.get("RANK", "0")) == 0


def _log_to_stderr() -> None:
    """Reports of the data and of the trainer, once however many processes train."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if _is_first_process() else logging.ERROR)


# -- train, sft -------------------------------------------------------------------------------------------------------


def train(arguments: list[str]) -> None:
    """Preference optimisation (WRPO and its family) on triples: a source's answer, the target's best and its worst.

        wrpo train examples/wrpo.yaml --train_file triples.jsonl --output_dir runs/wrpo

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    from wrpo import WRPOConfig
    from wrpo.settings import DataSettings, ModelSettings, parse_settings

    model, data, config = parse_settings(
        (ModelSettings, DataSettings, WRPOConfig), arguments, "wrpo train", getdoc(train)
    )
    from wrpo import WRPOTrainer

    _fit(WRPOTrainer, config, model, data, targets=True)


def sft(arguments: list[str]) -> None:
    """Fine-tuning on the source answers: the stage before wrpo train.

        wrpo sft examples/sft.yaml --model_name_or_path path/to/target --train_file sft.jsonl --output_dir runs/sft

    CONFIG.yaml holds the same fields as the flags, which win. Leaves the model, metrics.json and training_curves.png in
    output_dir.
    """
    from wrpo import SFTConfig
    from wrpo.settings import DataSettings, ModelSettings, parse_settings

    model, data, config = parse_settings((ModelSettings, DataSettings, SFTConfig), arguments, "wrpo sft", getdoc(sft))
    from wrpo import SFTTrainer

    _fit(SFTTrainer, config, model, data, targets=False)


def _fit(trainer_class: Any, config: Any, model: ModelSettings, data: DataSettings, targets: bool) -> None:
    """Train, save, and say where everything is. Data first: its errors are the cheapest to meet."""
    from transformers import set_seed

    from wrpo.pretrained import load_model, load_tokenizer, warn_of_coarse_weights
    from wrpo.training.resuming import find_checkpoint, train_from

    set_seed(config.seed)
    checkpoint = find_checkpoint(config)
    tokenizer = load_tokenizer(model)
    with config.main_process_first(desc="tokenising"):  # the others read what the first has put on disk
        rows = _rows(data.train_file, data.train_split, tokenizer, config, data, targets)
        eval_rows = data.eval_file and _rows(data.eval_file, data.eval_split, tokenizer, config, data, targets)
    if eval_rows and config.eval_strategy == "no":
        config.eval_strategy = type(config.eval_strategy)("epoch")
    try:
        policy = load_model(model)
        warn_of_coarse_weights(policy)
        trainer = trainer_class(
            policy,
            config,
            train_dataset=rows,
            eval_dataset=eval_rows or None,
            processing_class=tokenizer,
        )
    except (ValueError, TypeError) as error:  # settings, model and data that do not go together
        raise UserError(str(error)) from error
    train_from(trainer, checkpoint)
    trainer.save_model()
    if _is_first_process():
        _say_where(Path(config.output_dir))


def _rows(path: str, split: str, tokenizer: Any, config: Any, data: DataSettings, targets: bool) -> Any:
    from wrpo.data import load_triples, tokenize_triples

    return tokenize_triples(
        load_triples(path, split=split, skip_bad_rows=data.skip_bad_rows, stage="preference" if targets else "sft"),
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        skip_bad_rows=data.skip_bad_rows,
        chat_template_kwargs=_template_options(data.chat_template_kwargs),
        num_proc=data.tokenize_processes if data.tokenize_processes > 1 else None,
    )


def _template_options(text: str | None) -> dict | None:
    try:
        options = json.loads(text) if text is not None else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"chat_template_kwargs: not JSON: {error}") from error
    if not isinstance(options, (dict, type(None))):
        raise UserError(f"chat_template_kwargs: expected a mapping, got {text!r}")
    return options


def _say_where(folder: Path) -> None:
    for what, name in ENDINGS.items():
        if (folder / name).exists():
            print(f"{what:<8} {folder / name}")


# -- sample, score, build, logp, eval, info ---------------------------------------------------------------------------


def sample(arguments: list[str]) -> int:
    """Answers of any number of models to the same prompts."""
    from wrpo.sampling.command import run

    return run(arguments)


def score(arguments: list[str]) -> int:
    """Rewards of answers."""
    from wrpo.scoring.command import run

    return run(arguments)


def build(arguments: list[str]) -> None:
    """SFT split and triples from scored candidate answers."""
    from wrpo.building.command import run

    run(arguments)


def logp(arguments: list[str]) -> None:
    """The source models' own log-probs of the triples' responses."""
    from wrpo.reference.source_logp import run

    run(arguments)


def evaluate(arguments: list[str]) -> None:
    """Solved prompts, wins and implicit-reward accuracy on held-out data."""
    from wrpo.evaluation.command import run

    run(arguments)


def info(arguments: list[str]) -> None:
    """Versions, and which kernels run here."""
    if arguments in (["-h"], ["--help"]):
        return print(f"wrpo info\n\n{getdoc(info)} No options.")
    if arguments:
        raise UserError(f"takes no arguments, got {' '.join(arguments)}")
    from wrpo_kernels.__main__ import report  # what `python -m wrpo_kernels` prints

    print(report())


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "sft": sft,
    "sample": sample,
    "score": score,
    "build": build,
    "logp": logp,
    "eval": evaluate,
    "info": info,
}
