"""wrpo build [CONFIG.yaml] CANDIDATES ... -o FOLDER [--field value ...]: scored answers to training data.

    wrpo build answers_scored.jsonl target_scored.jsonl -o data     # data/sft.jsonl, data/triples.jsonl, a report

Words before the first flag are the settings file, if the first ends in .yaml or .yml, and candidates; `-o` is
`--output_dir`. Everything else is a field of `BuildFiles` or `BuildSettings`, in the file or as a flag.
"""

from __future__ import annotations

from itertools import takewhile

from wrpo.settings import parse_settings

from .pipeline import build
from .settings import BuildFiles, BuildSettings


def run(arguments: list[str]) -> None:
    """Build, print the report, and say where everything is."""
    files, settings = parse_settings((BuildFiles, BuildSettings), _named(arguments), "wrpo build", __doc__)
    written = build(settings, files)
    print(written.report)
    print(f"{written.seconds:,.1f} s, {written.report.candidates / written.seconds:,.0f} candidates/s")
    for kind, path in written.files.items():
        print(f"{kind:<8} {path}")


def _named(arguments: list[str]) -> list[str]:
    words = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    flags = ["--output_dir" if argument == "-o" else argument for argument in arguments[len(words) :]]
    config = words[:1] if words and words[0].endswith((".yaml", ".yml")) else []
    candidates = words[len(config) :]
    return [*config, *(["--candidates", *candidates] if candidates else []), *flags]
