"""Answers and rewards that `wrpo eval` has made itself, by the commands `wrpo sample` and `wrpo score`.

Both append to files in the output folder, so an evaluation that was stopped continues, and never asks twice.
"""

from __future__ import annotations

from argparse import Namespace

from wrpo.user_error import UserError

ANSWERS, SCORED = "answers.jsonl", "scored.jsonl"
SCORERS = ("verifier", "reward_model", "judge")


def ask(options: Namespace) -> str:
    """Every model of `options.sources` on `options.prompts`; the file of the answers.

    Raises:
        UserError: an answer could not be had, or what `wrpo sample` raises.
    """
    from wrpo.sampling.command import run

    path = str(options.output / ANSWERS)
    fields = sorted({*options.keep, *([options.group_by] if options.group_by else [])})
    drawn = {"--samples": options.samples, "--temperature": options.temperature, "--max-tokens": options.max_tokens}
    flags = [part for flag, value in drawn.items() for part in (flag, str(value))]
    if run([options.sources, *options.prompts, "-o", path, *flags, *(["--keep", *fields] if fields else [])]):
        raise UserError(f"{path}: some answers are missing, said why above; the same command asks for them again")
    return path


def score(paths: list[str], options: Namespace) -> str:
    """The answers of `paths` with the rewards of the scorer that `options` names; their file.

    Raises:
        UserError: an answer got no reward, or what `wrpo score` raises.
    """
    from wrpo.scoring.command import run

    path = str(options.output / SCORED)
    (name,) = [name for name in SCORERS if getattr(options, name)]
    flags = [f"--{name.replace('_', '-')}", getattr(options, name)]
    if name == "reward_model":
        flags += ["--torch-dtype", options.torch_dtype, "--batch-size", str(options.batch_size)]
        flags += ["--trust-remote-code"] if options.trust_remote_code else []
    if run([*paths, "-o", path, *flags]):
        raise UserError(f"{path}: some answers have no reward, said why above; the same command tries them again")
    return path
