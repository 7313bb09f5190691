"""wrpo build [CONFIG.yaml] CANDIDATES ... -o FOLDER [--field value ...]: scored answers to training data.

    wrpo build answers_scored.jsonl target_scored.jsonl -o data     # data/sft.jsonl, data/triples.jsonl, a report

Words are the settings file, if the first ends in .yaml or .yml, and candidates. The file holds the same fields as the
flags, which win.
"""

from __future__ import annotations

from wrpo.settings import parse_settings

from .pipeline import build
from .settings import BuildFiles, BuildSettings


def parse(arguments: list[str]) -> tuple[BuildFiles, BuildSettings]:
    return parse_settings((BuildFiles, BuildSettings), arguments, "wrpo build", __doc__, words=("candidates",))


def run(arguments: list[str]) -> None:
    """Build, print the report, and say where everything is."""
    files, settings = parse(arguments)
    written = build(settings, files)
    print(written.report)
    print(f"{written.seconds:,.1f} s, {written.report.candidates / written.seconds:,.0f} candidates/s")
    for kind, path in written.files.items():
        print(f"{kind:<8} {path}")
