"""wrpo eval [ANSWERS ...] -o FOLDER: what models are worth on prompts and triples that training never saw.

    ANSWERS     rows of `wrpo sample`, of one model or several: solved prompts, mean scores, and each model's wins over
                a baseline. --sources and --prompts ask for them here; --verifier, --reward-model or --judge score them
                here; without a scorer the rewards that `wrpo score` wrote into the rows count
    --triples   held-out triples: how often the policy's implicit reward prefers the chosen answers
    --export    the answers in the files that AlpacaEval 2 and Arena-Hard read

Any of them alone, or together; tables on the screen, eval.json and eval.png in FOLDER. Shares have Wilson intervals and
score gains over ten prompts or more paired bootstrap intervals over the prompts, both at 95 %. Answers that are in
FOLDER already are not asked for again: take another FOLDER, or empty it, when a model has changed.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrpo.flags import Flags, number, whole_number
from wrpo.scoring.command import SCORERS, refuse_empty
from wrpo.user_error import UserError

from .asking import ask, asked_here, score, scored_here

if TYPE_CHECKING:
    from .answers import Answer
    from .comparison import Comparison

EXPORTS = ("alpaca-eval", "arena-hard")


def flags() -> Flags:
    parser = Flags("wrpo eval", __doc__)
    parser.add_argument("answers", metavar="ANSWERS", nargs="*", help="rows of wrpo sample or wrpo score")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--export", nargs="+", choices=EXPORTS, default=[], help="also write what these read")
    group = parser.add_argument_group("asking here")
    group.add_argument("--sources", metavar="SOURCES.yaml", help="which models answer, as for wrpo sample")
    group.add_argument("--prompts", nargs="+", default=[], help="held-out prompts")
    group.add_argument("--samples", type=whole_number, default=1, help="answers a prompt and model (default: 1)")
    group.add_argument("--temperature", type=number, default=0.0, help="softmax temperature (default: 0, greedy)")
    group.add_argument("--max-tokens", type=whole_number, default=2048, help="longest answer (default: 2048)")
    group.add_argument("--keep", nargs="+", default=[], metavar="FIELD", help="fields of the prompts' rows to carry on")
    group = parser.add_argument_group("scoring here")
    scorer = group.add_mutually_exclusive_group()
    scorer.add_argument("--verifier", metavar="MODULE:FUNCTION", help="as for wrpo score")
    scorer.add_argument("--reward-model", metavar="PATH", help="as for wrpo score")
    scorer.add_argument("--judge", metavar="JUDGE.yaml", help="as for wrpo score")
    group = parser.add_argument_group("comparing")
    group.add_argument("--baseline", help="the model that the others must beat (default: the first in the files)")
    group.add_argument("--group-by", metavar="FIELD", help="field of the rows; each value is also reported by itself")
    group.add_argument("--solved-at", type=number, metavar="SCORE",
                       help="from where a prompt is solved (default: 1 with --verifier, else none)")  # fmt: skip
    _add_triples(parser)
    return parser


def _add_triples(parser: Flags) -> None:
    group = parser.add_argument_group("triples")
    group.add_argument("--triples", help="held-out triples in either form that wrpo train reads")
    group.add_argument("--policy", help="folder or hub name of the trained model and its tokenizer")
    group.add_argument("--reference", help="folder or hub name of the reference model")
    group.add_argument("--alpha", type=number, default=0.1, help="share of the sources (default: 0.1)")
    group.add_argument("--beta", type=number, default=0.01, help="scale of the rewards, 1/nats (default: 0.01)")
    group.add_argument("--max-length", type=whole_number, default=2048, help="most tokens in all (default: 2048)")
    group.add_argument("--max-prompt-length", type=whole_number, default=1800, help="in the prompt (default: 1800)")
    group.add_argument("--chat-template-file", help="Jinja file used instead of the tokenizer's chat template")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave bad triples out and count them")
    group = parser.add_argument_group("models of --triples and --reward-model")
    group.add_argument("--batch-size", type=whole_number, default=4, help="triples or answers at a time (default: 4)")
    group.add_argument("--torch-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                       help="type of the weights in memory (default: as saved)")  # fmt: skip
    group.add_argument("--trust-remote-code", action="store_true", help="run code that a hub repository carries")


def parse(arguments: list[str]) -> Namespace:
    """The options of `wrpo eval`.

    Raises:
        UserError: an unknown flag, one without its value, or flags that do not go together.
    """
    options = flags().read(arguments)
    refuse_empty(options)
    asks = options.sources is not None
    if asks != bool(options.prompts):
        raise UserError("--sources and --prompts go together: which models, and what they are asked")
    options.has_answers = bool(options.answers) or asks
    if not options.has_answers and options.triples is None:
        raise UserError(
            "nothing to evaluate: name files of answers, --sources with --prompts, or --triples with --policy and "
            "--reference"
        )
    if options.export and not options.has_answers:
        raise UserError("--export needs files of answers, or --sources and --prompts")
    if options.triples is not None and None in (options.policy, options.reference):
        raise UserError("--triples needs --policy and --reference, the model before preference optimisation")
    if options.verifier and options.solved_at is None:
        options.solved_at = 1.0
    return options


def run(arguments: list[str]) -> None:
    """Evaluate, print the tables, write the files, say where they are."""
    options = parse(arguments)
    _make_folder(options.output)
    from .report import answers_table, triples_table, write_json

    written = {"numbers": options.output / "eval.json"}
    comparison, accuracies = None, None
    if options.has_answers:
        answers = gather(options)
        written |= export(answers, options)
        comparison = compare_answers(answers, options)
    if options.triples is not None:
        from .implicit_reward import accuracy_of_models

        accuracies = accuracy_of_models(options)
    if comparison is not None:
        print(f"\n{answers_table(comparison)}\n{_left_out(comparison)}")
    if accuracies is not None:
        print(f"\n{triples_table(accuracies)}\n")
    write_json(written["numbers"], _settings(options), comparison, accuracies)
    if comparison is not None or accuracies is not None:
        from .picture import draw

        written["picture"] = options.output / "eval.png"
        draw(written["picture"], comparison, accuracies)
    for what, path in written.items():
        print(f"{what:<11} {path}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"-o {path}: expected a folder, got a file. Name another.") from None
    except OSError as error:
        raise UserError(f"-o {path}: the folder cannot be made: {error.strerror}. Name another.") from error


def _settings(options: Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _left_out(comparison: Comparison) -> str:
    count = comparison.left_out
    return f"left out: {count} prompts that not every model answered\n" if count else ""


def gather(options: Namespace) -> list[Answer]:
    """The answers of the files and of the models that are asked here, with the rewards of the scorer named here."""
    from .answers import read_answers

    paths, belongs = [*options.answers], lambda file, row: True
    if options.sources is not None:
        paths.append(ask(options))
        belongs = asked_here(paths[-1], options)
    if any(getattr(options, name) is not None for name in SCORERS):
        scored = score(paths, options, belongs)
        paths, belongs = [scored], scored_here(paths, options, belongs)
    return read_answers(paths, belongs)


def export(answers: list[Answer], options: Namespace) -> dict[str, Path]:
    """Writes the benchmarks' files; what was written, and in which folder."""
    from .benchmark_files import write_alpaca_eval, write_arena_hard

    write = {"alpaca-eval": write_alpaca_eval, "arena-hard": write_arena_hard}
    folders = {name: options.output / name.replace("-", "_") for name in options.export}
    for name, folder in folders.items():
        write[name](answers, folder)
    return folders


def compare_answers(answers: list[Answer], options: Namespace) -> Comparison | None:
    """The comparison of the models; None where nothing but an export was asked and the answers have no rewards."""
    from .answers import groups_of, scores_of
    from .comparison import compare

    if options.export and all(answer.reward is None for answer in answers):
        return None
    groups = groups_of(answers, options.group_by) if options.group_by else None
    return compare(scores_of(answers), baseline=options.baseline, groups=groups, solved_at=options.solved_at)
