"""The command `wrpo`.

    wrpo train CONFIG.yaml [--field value ...]     preference optimisation on triples
    wrpo dpo PAIRS --model_name_or_path MODEL      the same on pairs of a chosen and a rejected answer
    wrpo sft CONFIG.yaml [--field value ...]       the stage before it, on the source answers
    wrpo sample SOURCES.yaml PROMPTS ... -o FILE   answers of any number of models to the same prompts
    wrpo score CANDIDATES ... -o FILE              their rewards: a reward model, a judge or a verifier
    wrpo build CANDIDATES ... -o FOLDER            SFT split and triples from scored candidate answers
    wrpo logp TRIPLES ... -o FILE --models ...     the source models' own log-probs, for a fused reference
    wrpo logp TRIPLES ... -o FILE --reference ...  the reference's log-probs, for training to take
    wrpo eval [ANSWERS...] -o FOLDER               solved prompts, wins, implicit-reward accuracy on held-out data
    wrpo info                                      versions, and which kernels run here

`wrpo COMMAND --help` lists the rest, `wrpo --version` says which this is. Every command takes its settings as flags and
from a YAML file, `--config FILE`. Exit status: 0 done; 2 something the user can put right, said in one line; 3 (sample,
score) done but for what the summary lists, and the same command tries that again; 130 stopped by Ctrl-C; a traceback is
a bug.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress

from wrpo.spelling import nearest
from wrpo.user_error import UserError

logger = logging.getLogger("wrpo")

# Each is imported when it is called, so that `wrpo --help` and a mistyped command answer at once.
COMMANDS = {
    "train": "wrpo.training.command:train",
    "dpo": "wrpo.training.command:dpo",
    "sft": "wrpo.training.command:sft",
    "sample": "wrpo.sampling.command:run",
    "score": "wrpo.scoring.command:run",
    "build": "wrpo.building.command:run",
    "logp": "wrpo.reference.command:run",
    "eval": "wrpo.evaluation.command:run",
    "info": "wrpo.cli:info",
}
EXTRAS = dict.fromkeys(("accelerate", "datasets", "transformers", "yaml"), "train") | {"openai": "sample"}
CLOSED_PIPE = 141  # exit status: what reads our output has enough; as of a program that SIGPIPE ends


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # answers and paths hold more than some terminals can show
    prog = f"wrpo {arguments[0]}" if arguments and arguments[0] in COMMANDS else "wrpo"
    try:
        return _run_and_flush(_run, arguments)
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
    except BrokenPipeError:
        _discard_stdout()
        return CLOSED_PIPE
    except Exception as error:
        if not _cannot_be_written(error):
            raise
        status = _user_error(prog, f"cannot be read or written: {error}")
        _discard_stdout()
        return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from wrpo import __version__

        print(f"wrpo {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"no command {name!r}; {hint}")
    _log_to_stderr()
    command: Callable[[list[str]], int | None] = pkgutil.resolve_name(COMMANDS[name])
    return command(rest) or 0


def _run_and_flush(run: Callable[[list[str]], int], arguments: list[str]) -> int:
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


def _discard_stdout() -> None:
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


def info(arguments: list[str]) -> None:
    """Versions, and which kernels run here."""
    if arguments in (["-h"], ["--help"]):
        return print("wrpo info\n\nVersions, and which kernels run here. No options.")
    if arguments:
        raise UserError(f"takes no arguments, got {' '.join(arguments)}")
    from wrpo_kernels.environment import report

    print(report())
