"""What became of the requests: progress bar, failures, summary, exit status."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

INCOMPLETE = 3  # exit status: something was asked for and is not there; the same command tries again
REASONS_SHOWN = 5  # a name, most frequent first


@dataclass
class Counts:
    """Of one model or scorer."""

    wanted: int
    there: int = 0  # from earlier runs
    new: int = 0
    cut: int = 0  # of the new ones
    failed: Counter[str] = field(default_factory=Counter)  # reason -> how often
    first: dict[str, str] = field(default_factory=dict)  # reason -> where it was met first
    retries: int = 0
    given_up: str | None = None

    @property
    def not_asked(self) -> int:
        return self.wanted - self.there - self.new - self.failed.total()


class Tally:
    """Counts by name, shown while they grow.

    with Tally({"big": 500}, unit="answer") as tally:
        tally.add("big", cut=False)
        tally.fail("big", "no answer within 600 s", "sample 0 of prompt p1")
    print(tally.summary())
    """

    def __init__(self, wanted: dict[str, int], unit: str, there: dict[str, int] | None = None):
        self.counts = {name: Counts(number, (there or {}).get(name, 0)) for name, number in wanted.items()}
        self._unit = unit
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> Tally:
        done = sum(counts.there for counts in self.counts.values())
        total = sum(counts.wanted for counts in self.counts.values())
        self._bar = tqdm(total=total, initial=done, unit=self._unit, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self.seconds = time.monotonic() - self._start

    def add(self, name: str, *, cut: bool = False) -> None:
        counts = self.counts[name]
        counts.new += 1
        counts.cut += cut
        self._bar.update()

    def fail(self, name: str, reason: str, place: str) -> None:
        """Count a failure; the first of its kind is said at once, with its place."""
        counts = self.counts[name]
        if reason not in counts.failed:
            counts.first[reason] = place
            self._bar.write(f"{name}: {place}: {reason}", file=self._bar.fp)
        counts.failed[reason] += 1
        self._show()

    def give_up(self, name: str, reason: str) -> None:
        """Say that nothing more will be asked of `name` in this run, and why."""
        if self.counts[name].given_up is None:
            self.counts[name].given_up = reason
            self._bar.write(f"{name}: asks no further: {reason}", file=self._bar.fp)

    def retry(self, name: str) -> None:
        self.counts[name].retries += 1
        self._show()

    @property
    def status(self) -> int:
        """0, or `INCOMPLETE`."""
        return INCOMPLETE if any(counts.failed or counts.not_asked for counts in self.counts.values()) else 0

    def summary(self) -> str:
        """A table, and under it why something failed."""
        new = sum(counts.new for counts in self.counts.values())
        rate = f", {new / self.seconds:,.1f}/s" if new and self.seconds else ""
        lines = [f"{new:,} new {self._unit}s in {self.seconds:,.1f} s{rate}", *self._table()]
        for name, counts in self.counts.items():
            lines += [
                f"failed {count:,}: {name}: {reason}; first: {counts.first[reason]}"
                for reason, count in counts.failed.most_common(REASONS_SHOWN)
            ]
            if counts.given_up:
                lines.append(f"not asked {counts.not_asked:,}: {name}: {counts.given_up}")
        if self.status:
            lines.append("incomplete: the same command tries again what is missing")
        return "\n".join(lines)

    def _table(self) -> list[str]:
        titles = ("", "there", "new", "cut", "failed", "not asked")
        rows = [
            (name, *(f"{n:,}" for n in (c.there, c.new, c.cut, c.failed.total(), c.not_asked)))
            for name, c in self.counts.items()
        ]
        shown = [i for i, title in enumerate(titles) if title != "cut" or any(c.cut for c in self.counts.values())]
        widths = [max(len(row[i]) for row in (titles, *rows)) for i in shown]
        return [
            "  ".join(row[i].ljust(w) if i == 0 else row[i].rjust(w) for i, w in zip(shown, widths, strict=True))
            for row in (titles, *rows)
        ]

    def _show(self) -> None:
        failed = sum(counts.failed.total() for counts in self.counts.values())
        retries = sum(counts.retries for counts in self.counts.values())
        self._bar.set_postfix_str(
            ", ".join(f"{n} {what}" for n, what in ((failed, "failed"), (retries, "retries")) if n)
        )
