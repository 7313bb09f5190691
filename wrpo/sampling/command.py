"""wrpo sample SOURCES.yaml PROMPTS ... -o CANDIDATES.jsonl: answers of any number of models to the same prompts.

    SOURCES.yaml   who answers: OpenAI-compatible servers, models that transformers or vLLM run here
                   (examples/sources.yaml shows every kind, the end of this help lists every field)
    PROMPTS        rows {"prompt_id": ..., "prompt": text or messages}: .jsonl, .jsonl.gz, .parquet, or a saved data set
    CANDIDATES     one row an answer, appended as it comes; `wrpo score` adds the reward, `wrpo build` makes triples

The same command continues where it was stopped or killed, and never asks for an answer that is there. On several
machines, give each the same files, --shard i/n and an output file of its own.

Exit status: 0 every answer is there; 3 some are missing, said why: the same command asks for them again; 2 something to
put right first; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

from wrpo.rows.shards import in_shard
from wrpo.settings import describe_fields, parse_settings

from .asking import sample
from .prompts import Prompts
from .settings import SampleSettings, Sampling
from .sources import KINDS, read_sources


def parse(arguments: list[str]) -> tuple[SampleSettings, Sampling]:
    kinds = (f"fields of an entry with kind: {kind}\n{describe_fields(cls)}" for kind, cls in KINDS.items())
    return parse_settings(
        (SampleSettings, Sampling),
        arguments,
        "wrpo sample",
        __doc__,
        words=("sources", "prompts"),
        config_is_first=False,  # a first word that ends in .yaml is SOURCES.yaml
        epilog="\n\n".join(kinds),
    )


def run(arguments: list[str]) -> int:
    return sample_files(*parse(arguments))


def sample_files(settings: SampleSettings, sampling: Sampling) -> int:
    """Ask, print what became of it, and return the exit status."""
    sources = read_sources(settings.sources, settings.model)
    prompts = Prompts(
        settings.prompts,
        keep=tuple(settings.keep),
        in_shard=in_shard(settings.shard),
        skip_bad_rows=settings.skip_bad_rows,
    )
    repeated = f"; {prompts.repeated} repeated" if prompts.repeated else ""
    print(f"{len(prompts):,} prompts; {prompts.bad.report()}{repeated}")
    tally = sample(prompts, sources, settings.output, sampling)
    print(tally.summary())
    print(f"candidates  {settings.output}")
    return tally.status
