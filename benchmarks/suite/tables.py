"""Markdown of a file of results: every figure, and the short table of benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.suite.contestants import FLOOR, FUSED
from benchmarks.suite.results import Figure, Row

READING = (
    "Times of others are multiples of ours, memory is MiB beside inputs and gradients.",
    "Ratios are medians over rounds of neighbouring steps, so they need not be the ratios of the medians.",
)
READING_OF = {
    "cpu": (
        "The floor is torch's own products in the same dtype, into ready buffers. Where torch multiplies slowly our",
        "step is far below 1: float32 on AMD's processors, where it multiplies by itself, and 16 bits on one without",
        "products of that type.",
    ),
    "cuda": (
        "Each step starts on an idle device, so that what the host takes to queue it counts.",
        "Memory is mostly the 1 GiB of `budget_bytes`; less of it is leaner and slower. The smaller D is,",
        "the less a product does for each logit, and the more the passes over rows and the float32 dW show.",
    ),
}
IN_README = ("everyone", "heads", "kinds", "layouts", "precision", "softcap", "prompt", "toy")  # the others are curves


def whole(facts: dict[str, str], rows: list[Row], pictures: Iterable[str] = ()) -> str:
    """The machine, the pictures, and a table for each problem."""
    parts = [f"# {facts['machine']}, {facts['date']}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    parts += [f"![{Path(picture).stem.rsplit('_', 1)[1]}]({picture})\n" for picture in pictures]
    for (scenario, point), some in by_point(rows):
        parts += [f"## {scenario}: {point}", "", described(some[0]), "", *table(row.figure for row in some), ""]
    return "\n".join(parts)


def by_point(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    for name, some in groupby(rows, lambda row: row.figure[:2]):
        yield name, list(some)


def described(row: Row) -> str:
    s = row.setting
    kind = "pairs" if not s.sources else f"{s.sources} source{'s' if s.sources > 1 else ''}, target, rejected"
    extras = [f"softcap {s.softcap:g}"] if s.softcap else []
    extras += [f"budget {s.budget_mib} MiB"] if s.budget_mib else []
    return ", ".join(
        [
            f"V = {s.vocabulary}, D = {s.width}, N = {s.num_rows} ({s.sequences} responses of {s.response} behind "
            f"prompts of {s.prompt}; {kind})",
            s.dtype,
            f"{s.head} head",
            *extras,
        ]
    )


def table(figures: Iterable[Figure]) -> Iterator[str]:
    figures = list(figures)
    timed = [figure for figure in figures if figure.p50_ms is not None]
    if timed:
        yield "| | ms [p20, p80] | forward | backward | x floor | x fused | peak MiB | error loss | dh | dW |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for f in timed:
        span = f"{short(f.p50_ms)} [{short(f.p20_ms)}, {short(f.p80_ms)}]"
        parts = (short(f.forward_p50_ms), short(f.backward_p50_ms), ratio(f.times_floor), ratio(f.times_fused))
        errors = (error(f.error_loss), error(f.error_dh), error(f.error_dW))
        yield f"| {f.contestant} | {span} | {' | '.join((*parts, whole_number(f.peak_mib), *errors))} |"
    if timed and len(timed) < len(figures):
        yield ""
    yield from (f"- {f.contestant + ': ' if f.contestant else ''}{f.note}" for f in figures if f.p50_ms is None)


def summary(facts: dict[str, str], rows: list[Row], table: str, *pictures: str) -> list[str]:
    """A line for each problem: ours, then the best of the others in time and in memory, then plain torch.

    table, pictures: paths of the whole table and of what is shown, from the page that holds the lines.
    """
    cores = f" ({facts['cores'].split(',')[0]} cores)" if facts["device"] == "cpu" else ""
    lines = [
        f"Forward and backward on {facts['machine']}{cores}, torch {facts['torch']}, "
        f"{facts['date']}, commit {facts['commit']}: `{facts['command']}`.",
        "",
        "| | ours | x floor | fastest other | plain torch | memory: ours | leanest other | plain torch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    skipped = []
    for (scenario, point), some in by_point(rows):
        found = {row.figure.contestant: row.figure for row in some if row.figure.p50_ms is not None}
        if scenario in IN_README and FUSED.name in found:
            lines.append(summary_line(point, some[0], found))
        elif scenario in IN_README:
            skipped.append(f"{point}, N = {some[0].setting.num_rows}")
    lines += ["", *READING, *READING_OF[facts["device"]]]
    lines += [f"Skipped, the whole table says why: {'; '.join(skipped)}.", ""] if skipped else [""]
    lines += [f"![time and memory: {Path(picture).stem.rsplit('_', 1)[1]}]({picture})\n" for picture in pictures]
    return [*lines, f"[Every contestant on every problem]({table}), with errors against float64 and more pictures."]


def summary_line(point: str, row: Row, found: dict[str, Figure]) -> str:
    ours = found.pop(FUSED.name)
    found.pop(FLOOR, None)
    plain = found.get("plain torch")
    fastest = min(found.values(), key=lambda f: f.times_fused, default=None)
    leanest = min(found.values(), key=lambda f: f.peak_mib, default=None)
    cells = [
        f"{point}, N = {row.setting.num_rows}",
        f"{short(ours.p50_ms)} ms",
        ratio(ours.times_floor),
        f"{ratio(fastest.times_fused)} x ({fastest.contestant})" if fastest else "",
        f"{ratio(plain.times_fused)} x" if plain else "",
        f"{whole_number(ours.peak_mib)} MiB",
        f"{whole_number(leanest.peak_mib)} ({leanest.contestant})" if leanest else "",
        whole_number(plain.peak_mib) if plain else "",
    ]
    return f"| {' | '.join(cells)} |"


def put_into_readme(readme: Path, device: str, lines: list[str]) -> None:
    """Replaces what stands between the two markers of this kind of device."""
    text = readme.read_text()
    first, last = f"<!-- benchmarks {device} -->", f"<!-- /benchmarks {device} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"{readme} must hold one {first} and one {last}; the table goes between them")
    before, rest = text.split(first)
    readme.write_text("\n".join([before + first, *lines, last]) + rest.split(last)[1])


def short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def whole_number(value: float | None) -> str:
    """As an int, which knows no negative zero."""
    return "" if value is None else f"{round(value)}"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
