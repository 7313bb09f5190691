"""What became of the candidates: counts, shares and means that fill as the rows go by, in constant memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

DRAWN = ("SFT answer", "source_chosen", "target_chosen", "rejected")
ANSWERS = (*DRAWN, "source of tie", "tied answer")
SAMPLE = 20_000  # rows whose rewards are drawn; they come in the order of a hash, so the first are a random sample


@dataclass
class Mean:
    """Running means over the rows of one kind of answer."""

    rows: int = 0
    reward: float = 0.0
    chars: float = 0.0

    def add(self, reward: float, text: str) -> None:
        self.rows += 1
        self.reward += (reward - self.reward) / self.rows
        self.chars += (len(text) - self.chars) / self.rows


@dataclass
class BuildReport:
    """`str()` of it is what `wrpo build` prints; `as_json()` is report.json.

    Attributes:
        candidates: good rows read, of the scorer.  bad_rows: a clause about the others.
        prompts: different prompts among the rows.
        sft, triples: rows built.  ties: rows of a source and a rejected answer alone, where the target's answers tie.
        cut: responses in the rows built that are cut, with `cut_answers` keep.
        unanswered: prompts handed to the target, in the stage before it has answered.
        dropped_answers, dropped_prompts: reason -> count.
        unknown_reasons: finish_reason that no server is known to give -> candidates that have it.
        won: model -> prompts on which its answer is the best of all source answers, of the prompts that have any.
        means: kind of answer -> means over the rows built; the answers of ties have kinds of their own.
        sample: kind of answer -> rewards, for the picture, which leaves ties out.
    """

    candidates: int = 0
    prompts: int = 0
    sft: int = 0
    triples: int = 0
    ties: int = 0
    cut: int = 0
    unanswered: int = 0
    bad_rows: str = "no bad rows"
    dropped_answers: Counter[str] = field(default_factory=Counter)
    dropped_prompts: Counter[str] = field(default_factory=Counter)
    unknown_reasons: Counter[str] = field(default_factory=Counter)
    won: Counter[str] = field(default_factory=Counter)
    means: dict[str, Mean] = field(default_factory=lambda: {answer: Mean() for answer in ANSWERS})
    sample: dict[str, list[float]] = field(default_factory=lambda: {answer: [] for answer in DRAWN})

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Count a row that was built."""
        if kind == "prompts":
            self.unanswered += 1
            return
        self.cut += sum(row.get("cut", ()))
        source = row["source_reward"][0], row["source_chosen"][0]
        if kind == "sft":
            self.sft += 1
            self._note("SFT answer", *source)
        elif "target_chosen" in row:
            self.triples += 1
            self._note("source_chosen", *source)
            self._note("target_chosen", row["target_reward"], row["target_chosen"])
            self._note("rejected", row["rejected_reward"], row["rejected"])
        else:
            self.ties += 1
            self._note("source of tie", *source)
            self._note("tied answer", row["rejected_reward"], row["rejected"])

    def _note(self, answer: str, reward: float, text: str) -> None:
        self.means[answer].add(reward, text)
        if answer in DRAWN and len(self.sample[answer]) < SAMPLE:
            self.sample[answer].append(reward)

    @property
    def preferences(self) -> int:
        """Rows for `wrpo train`."""
        return self.triples + self.ties

    def summary(self) -> str:
        """One line: what came in and out, and what became of the other prompts and answers."""
        lost = _in_line("prompts left out", self.dropped_prompts) + _in_line("answers left out", self.dropped_answers)
        return self._first_line() + lost

    def _first_line(self) -> str:
        built = [f"{self.sft:,} SFT rows"] if self.sft else []
        built += [f"{self.unanswered:,} prompts for the target"] if self.unanswered else []
        built += [] if self.unanswered else [f"{self.triples:,} triples"]
        built += [f"{self.ties:,} rows of ties"] if self.ties else []
        return f"{self.candidates:,} candidates for {self.prompts:,} prompts -> {', '.join(built)}; {self.bad_rows}"

    def __str__(self) -> str:
        lines = [self._first_line()]
        lines += [f"{self.cut:,} responses in them are cut, and train without an end"] if self.cut else []
        lines += _counted("candidates of a finish_reason that is not known, taken as ended", self.unknown_reasons)
        lines += _counted("answers left out", self.dropped_answers)
        lines += _counted("prompts left out", self.dropped_prompts)
        if self.won:
            total = self.won.total()
            lines.append(f"share of {total:,} prompts on which a model's answer is the best of the sources'")
            lines += [f"  {count / total:6.2%}  {model}" for model, count in sorted(self.won.items(), key=_by_count)]
        means = [(answer, mean) for answer, mean in self.means.items() if mean.rows]
        if means:
            lines.append(f"{'means':<15}{'reward':>10}{'characters':>12}{'rows':>12}")
            lines += [f"  {answer:<13}{m.reward:10.4g}{m.chars:12,.0f}{m.rows:12,}" for answer, m in means]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Every count and mean; not the sample."""
        values = {name: value for name, value in vars(self).items() if name not in ("sample", "means")}
        return values | {"means": {answer: vars(mean) for answer, mean in self.means.items()}}


def _counted(title: str, reasons: Counter[str]) -> list[str]:
    if not reasons.total():
        return []
    return [title] + [f"  {count:>9,}  {reason}" for reason, count in sorted(reasons.items(), key=_by_count) if count]


def _in_line(title: str, reasons: Counter[str]) -> str:
    counts = [f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=_by_count) if count]
    return f"; {title}: {', '.join(counts)}" if counts else ""


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
