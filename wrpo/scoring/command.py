"""wrpo score CANDIDATES ... -o SCORED.jsonl: the rewards of answers, by one of three scorers.

    --reward-model PATH          a sequence classification model with a chat template
    --judge JUDGE.yaml           a model behind an OpenAI-compatible server that is asked for a number
                                 (--help lists the file's fields)
    --verifier module:function   a Python function of (prompt, response), or (prompt, response, row)

CANDIDATES are rows of `wrpo sample`; SCORED gets each of them with `reward` and `scorer`, appended as it comes, in
any order, ready for `wrpo build` and `wrpo eval`. The same command continues where it was stopped or killed. NaN and
infinite rewards are refused, and their rows named. On several machines, give each the same files, --shard i/n and an
output file of its own.

Exit status: 0 every answer has its reward; 3 some have none, said why: the same command tries them again; 2 something
to put right first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from wrpo.flags import Flags, describe_fields, whole_number
from wrpo.user_error import UserError

if TYPE_CHECKING:
    from .scoring import Scorer

SCORERS = ("verifier", "reward_model", "judge")


def flags() -> Flags:
    parser = Flags("wrpo score", __doc__)
    parser.add_argument("candidates", metavar="CANDIDATES", nargs="+", help="answers: .jsonl, .jsonl.gz, .parquet ...")
    parser.add_argument("-o", "--output", required=True, help="file that scored answers are appended to, .jsonl")
    scorer = parser.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="PATH", help="folder or hub name of the model and its tokenizer")
    scorer.add_argument("--judge", metavar="JUDGE.yaml", help="server, template and scale of a judge")
    scorer.add_argument("--verifier", metavar="MODULE:FUNCTION", help="found from the current folder or installed")
    group = parser.add_argument_group("reward model")
    group.add_argument("--batch-size", type=whole_number, default=8, help="answers scored at a time (default: 8)")
    group.add_argument("--max-length", type=whole_number, help="most tokens, longer is refused (default: the model's)")
    group.add_argument("--label", type=int, help="which of several numbers is the reward, from 0")
    group.add_argument("--torch-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                       help="type of the weights in memory (default: as saved)")  # fmt: skip
    group.add_argument("--attn-implementation", help="eager, sdpa, flash_attention_2 (default: transformers' choice)")
    group.add_argument("--chat-template-file", help="Jinja file used instead of the tokenizer's chat template")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that a hub repository carries")
    group = parser.add_argument_group("which answers")
    group.add_argument("--shard", help="i/n: only the i-th of n parts of the prompts, i from 0")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out and count them")
    return parser


def run(arguments: list[str], belongs: Callable[[str, dict], bool] = lambda file, row: True) -> int:
    """Score the rows that `belongs(file, row)` lets through, print what became of it, and return the exit status."""
    parser = flags()
    if {"-h", "--help"} & set(arguments):
        from .judge import JudgeSource  # seconds of imports that only this help needs

        parser.epilog = f"fields of JUDGE.yaml\n{describe_fields(JudgeSource)}"
    options = parser.read(arguments)
    refuse_empty(options)
    from wrpo.rows.shards import in_shard

    from .candidates import Candidates
    from .scoring import score

    candidates = Candidates(
        options.candidates,
        options.output,
        in_shard=in_shard(options.shard),
        belongs=belongs,
        skip_bad_rows=options.skip_bad_rows,
    )
    print(f"{len(candidates):,} answers; {candidates.bad.report()}")
    tally = score(candidates, _scorer(options), options.output)
    print(tally.summary())
    print(f"scored  {options.output}")
    return tally.status


def refuse_empty(options: Namespace) -> None:
    """Raises UserError for a scorer without a name, as an unset variable of the shell leaves it."""
    for name in SCORERS:
        value = getattr(options, name)
        if value is not None and not value.strip():
            raise UserError(f"--{name.replace('_', '-')}: expected a name, got {value!r}")


def _scorer(options: Namespace) -> Scorer:
    if options.verifier is not None:
        from .verifier import Verifier

        return Verifier(options.verifier)
    if options.judge is not None:
        from .judge import Judge, read_judge

        return Judge(read_judge(options.judge))
    from wrpo.settings import ModelSettings

    from .reward_model import RewardModel

    settings = ModelSettings(
        model_name_or_path=options.reward_model,
        torch_dtype=options.torch_dtype,
        attn_implementation=options.attn_implementation,
        chat_template_file=options.chat_template_file,
        trust_remote_code=options.trust_remote_code,
    )
    return RewardModel(settings, batch_size=options.batch_size, max_length=options.max_length, label=options.label)
