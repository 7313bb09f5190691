"""wrpo eval [ANSWERS ...] -o FOLDER: what models are worth on prompts and triples that training never saw.

    answers     rows of `wrpo sample`, of one model or several, scored by `wrpo score` or by a scorer named here: solved
                prompts, mean scores, and each model's wins over a baseline
    --triples   held-out triples: how often the policy's implicit reward prefers the chosen answers
    --export    the answers in the files of AlpacaEval 2 and Arena-Hard

Any of them alone, or together; tables on the screen, eval.json and eval.png in FOLDER. Shares have Wilson intervals and
score gains paired bootstrap intervals over the prompts, both at 95 % (`wrpo.evaluation.intervals`).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wrpo.user_error import UserError

if TYPE_CHECKING:
    from .answers import Answer
    from .comparison import Comparison
    from .implicit_reward import Accuracy

EXPORTS = ("alpaca-eval", "arena-hard")


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(arguments: list[str]) -> Namespace:
    """The options of `wrpo eval`.

    Raises:
        UserError: an unknown option, one without its value, or nothing to evaluate.
    """
    parser = _Parser(
        prog="wrpo eval", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("answers", nargs="*", help="rows of prompt_id, prompt, model, sample, response and reward")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of eval.json, eval.png and exports")
    parser.add_argument("--export", nargs="+", choices=EXPORTS, default=[], help="also write what these read")
    _add_comparison(parser)
    _add_triples(parser)
    options = parser.parse_args(arguments)
    if not options.answers and options.triples is None:
        raise UserError("nothing to evaluate: name files of answers, or --triples with --policy and --reference")
    if options.export and not options.answers:
        raise UserError("--export needs files of answers")
    if options.triples is not None and None in (options.policy, options.reference):
        raise UserError("--triples needs --policy and --reference, the model before preference optimisation")
    return options


def _add_comparison(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--baseline", help="the model that the others must beat (default: the first in the files)")
    group.add_argument("--group-by", metavar="FIELD", help="field of the rows; each value is also reported by itself")
    group.add_argument("--solved-at", type=float, metavar="SCORE", help="score from which a prompt counts as solved")


def _add_triples(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("triples")
    group.add_argument("--triples", help="held-out triples in either form that `wrpo train` reads")
    group.add_argument("--policy", help="folder or hub name of the trained model and its tokenizer")
    group.add_argument("--reference", help="folder or hub name of the reference model")
    group.add_argument(
        "--alpha", type=float, default=0.1, help="share of the sources in the weighted reward (default: 0.1)"
    )
    group.add_argument("--beta", type=float, default=0.01, help="scale of the rewards, 1/nats (default: 0.01)")
    group.add_argument("--max-length", type=int, default=2048, help="most tokens in prompt + response (default: 2048)")
    group.add_argument("--max-prompt-length", type=int, default=1800, help="most tokens in the prompt (default: 1800)")
    group.add_argument("--batch-size", type=int, default=4, help="triples in a batch (default: 4)")
    group.add_argument("--torch-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                       help="type of the weights in memory (default: as saved)")  # fmt: skip
    group.add_argument("--chat-template-file", help="Jinja file used instead of the tokenizer's chat template")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that a hub repository carries")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave bad triples out and count them")


def run(arguments: list[str]) -> None:
    """Evaluate, print the tables, write the files, say where they are."""
    options = parse(arguments)
    from .report import answers_table, triples_table, write_json

    options.output.mkdir(parents=True, exist_ok=True)
    written = {"numbers": options.output / "eval.json"}
    comparison, accuracies = None, None
    if options.answers:
        from .answers import read_answers

        answers = read_answers(options.answers)
        written |= export(answers, options)
        comparison = compare_answers(answers, options)
        if comparison is not None:
            print(f"{answers_table(comparison)}\n{_left_out(comparison)}")
    if options.triples is not None:
        accuracies = prefer_chosen(options)
        print(f"{triples_table(accuracies)}\n")
    write_json(written["numbers"], _settings(options), comparison, accuracies)
    if comparison is not None or accuracies is not None:
        from .picture import draw

        written["picture"] = options.output / "eval.png"
        draw(written["picture"], comparison, accuracies)
    for what, path in written.items():
        print(f"{what:<11} {path}")


def _settings(options: Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _left_out(comparison: Comparison) -> str:
    count = comparison.left_out
    return f"left out: {count} prompts that not every model answered\n" if count else ""


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


def prefer_chosen(options: Namespace) -> dict[str, Accuracy]:
    """Implicit-reward accuracies of the policy on the triples."""
    import torch

    from wrpo.data import load_triples, tokenize_triples
    from wrpo.pretrained import load_model, load_tokenizer
    from wrpo.settings import ModelSettings

    from .implicit_reward import implicit_reward_accuracy, response_logps

    def settings(name: str) -> ModelSettings:
        return ModelSettings(
            model_name_or_path=name,
            torch_dtype=options.torch_dtype,
            chat_template_file=options.chat_template_file,
            trust_remote_code=options.trust_remote_code,
        )

    tokenizer = load_tokenizer(settings(options.policy))
    if load_tokenizer(settings(options.reference)).get_vocab() != tokenizer.get_vocab():
        raise UserError("--reference has another vocabulary than --policy: name the model that the policy started from")
    rows = tokenize_triples(
        load_triples(options.triples, skip_bad_rows=options.skip_bad_rows),
        tokenizer,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        skip_bad_rows=options.skip_bad_rows,
    )
    rows = list(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def logps(name: str, title: str) -> list[torch.Tensor]:
        model = load_model(settings(name)).to(device)
        return response_logps(model, rows, tokenizer, batch_size=options.batch_size, title=title)

    policy, reference = logps(options.policy, "policy"), logps(options.reference, "reference")
    return implicit_reward_accuracy(policy, reference, rows, alpha=options.alpha, beta=options.beta)
