"""wrpo sample SOURCES.yaml PROMPTS ... -o CANDIDATES.jsonl: answers of any number of models to the same prompts.

    SOURCES.yaml   who answers: OpenAI-compatible servers, models that transformers or vLLM run here
                   (examples/sources.yaml shows every kind, --help lists every field)
    PROMPTS        rows {"prompt_id": ..., "prompt": text or messages}: .jsonl, .jsonl.gz, .parquet, or a saved data set
    CANDIDATES     one row an answer, appended as it comes; `wrpo score` adds the reward, `wrpo build` makes triples

The same command continues where it was stopped or killed, and never asks for an answer that is there. On several
machines, give each the same files, --shard i/n and an output file of its own.

Exit status: 0 every answer is there; 3 some are missing, said why: the same command asks for them again; 2 something to
put right first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from wrpo.flags import Flags, describe_fields, number, whole_number
from wrpo.user_error import UserError

ROW_FIELDS = ("prompt_id", "prompt", "model", "sample", "response", "reward", "finish_reason", "seed", "temperature",
              "top_p", "max_tokens")  # fmt: skip


def flags() -> Flags:
    parser = Flags("wrpo sample", __doc__)
    parser.add_argument("sources", metavar="SOURCES.yaml", help="which models answer")
    parser.add_argument("prompts", metavar="PROMPTS", nargs="+", help="what they are asked")
    parser.add_argument("-o", "--output", required=True, help="file that answers are appended to, .jsonl")
    group = parser.add_argument_group("drawing answers (defaults: the paper's, arXiv:2412.03187)")
    group.add_argument("--samples", type=whole_number, default=5, help="answers a prompt and model (default: 5)")
    group.add_argument("--temperature", type=number, default=0.8, help="softmax temperature (default: 0.8)")
    group.add_argument("--top-p", type=number, default=0.95, help="nucleus sampling (default: 0.95)")
    group.add_argument("--max-tokens", type=whole_number, default=2048, help="longest answer (default: 2048)")
    group.add_argument("--seed", type=int, default=42, help="of the seeds of all answers (default: 42)")
    group = parser.add_argument_group("which requests")
    group.add_argument("--model", nargs="+", default=[], help="ask only these models of the file")
    group.add_argument("--shard", help="i/n: only the i-th of n parts of the prompts, i from 0")
    group.add_argument("--keep", nargs="+", default=[], metavar="FIELD", help="fields of the prompts' rows to carry on")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave bad prompts out and count them")
    return parser


def run(arguments: list[str]) -> int:
    """Ask, print what became of it, and return the exit status."""
    parser = flags()
    if {"-h", "--help"} & set(arguments):
        from .sources import KINDS  # seconds of imports that only this help needs

        kinds = (f"fields of an entry with kind: {kind}\n{describe_fields(cls)}" for kind, cls in KINDS.items())
        parser.epilog = "\n\n".join(kinds)
    options = parser.read(arguments)
    from wrpo.rows.shards import in_shard

    from .asking import sample
    from .prompts import Prompts
    from .sources import Sampling, read_sources

    try:
        drawn = Sampling(options.samples, options.temperature, options.top_p, options.max_tokens, options.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    sources = read_sources(options.sources, options.model)
    for name in options.keep:
        if name in ROW_FIELDS:
            raise UserError(f"--keep: {name} is a field of the answers themselves")
    prompts = Prompts(
        options.prompts,
        keep=tuple(options.keep),
        in_shard=in_shard(options.shard),
        skip_bad_rows=options.skip_bad_rows,
    )
    repeated = f"; {prompts.repeated} repeated" if prompts.repeated else ""
    print(f"{len(prompts):,} prompts; {prompts.bad.report()}{repeated}")
    tally = sample(prompts, sources, options.output, drawn)
    print(tally.summary())
    print(f"candidates  {options.output}")
    return tally.status
