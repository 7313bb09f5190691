"""docs/fusion.md: the tables, the paper's claims beside what was measured, their picture; from what is on the disk."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .arms import ALPHAS, LOSSES, SFT, WRPO_ALPHA, all_arms
from .models import ARCHITECTURES, OWN_SHARE, SOURCES, TARGET
from .pictures import draw_claims
from .results import EVERYTHING, Estimate, Results, estimate
from .seed import Size, model_seconds
from .skills import SKILLS, tasks


class Claim(NamedTuple):
    """What should be positive, by the paper or by its own logic, and the difference that says whether it is."""

    words: str
    gain: Estimate | None

    @property
    def verdict(self) -> str:
        if self.gain is None:
            return "not measured"
        if self.gain.seeds < 2:
            return "one seed"
        if not self.gain.excludes_zero:
            return "undecided"
        return "repeats" if self.gain.mean > 0 else "the opposite"


def claims(results: Results, k: int) -> list[Claim]:
    """The paper's, then the baselines that it leaves out."""
    wrpo, gain = f"wrpo-{WRPO_ALPHA}-{k}", results.gain
    return [
        Claim("SFT on source answers beats the target", gain(f"sft-{k}", "target")),
        Claim("SFT, DPO beats SFT", gain(f"dpo-{k}", f"sft-{k}")),
        Claim(f"SFT, WRPO (0 to {WRPO_ALPHA}) beats SFT, DPO", gain(wrpo, f"dpo-{k}")),
        Claim("SFT, WRPO (0 to 0.1, the paper's alpha) beats SFT, DPO", gain(f"wrpo-0.1-{k}", f"dpo-{k}")),
        Claim("rising alpha beats static alpha, mean over the same ends", rising_over_static(results, k)),
        Claim(f"rising alpha beats static alpha, both to {WRPO_ALPHA}", gain(wrpo, f"wrpo-static-{WRPO_ALPHA}-{k}")),
        Claim("WRPO: two sources beat one", gain("wrpo-0.5-2", "wrpo-0.5-1")),
        Claim(f"WRPO: {k} sources beat two", gain(f"wrpo-0.5-{k}", "wrpo-0.5-2")),
        Claim("one source: WRPO beats DPO", gain("wrpo-0.5-1", "dpo-1")),
        Claim("WRPO_IPO beats IPO", gain(f"wrpo-ipo-0.5-{k}", f"ipo-{k}")),
        Claim("WRPO_SimPO beats SimPO", gain(f"wrpo-simpo-0.5-{k}", f"simpo-{k}")),
        Claim("*not in the paper:* WRPO beats DPO with source answers as chosen", gain(wrpo, f"dpo-source-{k}")),
        Claim("*not in the paper:* WRPO beats SFT on all source answers", gain(wrpo, f"sft-all-{k}")),
        Claim(
            "*ours:* the best answer of each source beats the best of all", gain(f"wrpo-each-0.5-{k}", f"wrpo-0.5-{k}")
        ),
    ]


def rising_over_static(results: Results, k: int) -> Estimate | None:
    """The difference averaged over `ALPHAS` within each seed that has all of them."""
    pairs = [(f"wrpo-{alpha}-{k}", f"wrpo-static-{alpha}-{k}") for alpha in ALPHAS]
    seeds = set.intersection(*(set(results.seeds(arm)) for pair in pairs for arm in pair))
    means = [
        sum(results.accuracy(seed, rising) - results.accuracy(seed, static) for rising, static in pairs) / len(pairs)
        for seed in sorted(seeds)
    ]
    return estimate(means) if means else None


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns of numbers stand at the right."""
    numbers = [any(cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    rule = ["---:" if is_number else "---" for is_number in numbers or [False] * len(head)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def arm_table(results: Results, arms: Iterable[str], over: str) -> str:
    """Accuracy of each arm, all skills and each, and its gain over another arm."""
    rows = []
    for arm in arms:
        found = [results.mean(arm, skill) for skill in (EVERYTHING, *SKILLS)]
        if found[0] is not None:
            gain = results.gain(arm, over)
            rows.append([arm, str(found[0]), str(gain or ""), *[f"{e.mean:.0f}" for e in found[1:] if e]])
            rows[-1].append(str(found[0].seeds))
    return markdown_table(["arm", "all skills (%)", f"minus {over}", *SKILLS, "seeds"], rows)


def claim_table(results: Results, k: int) -> str:
    rows = [[c.words, str(c.gain or ""), str(c.gain.seeds) if c.gain else "0", c.verdict] for c in claims(results, k)]
    return markdown_table(["claim", "difference (points)", "seeds", "here"], rows)


def model_table() -> str:
    specs = SOURCES | {"target": TARGET}
    rows = [
        [name, ARCHITECTURES[s.architecture][0].removesuffix("Config"), s.tokenizer, ", ".join(s.skills), str(s.steps)]
        for name, s in specs.items()
    ]
    return markdown_table(["model", "architecture", "tokenizer", "own skills", "steps of 64 tasks"], rows)


def skill_table() -> str:
    """An example of each skill."""
    examples = [next(tasks(skill, "train", random.Random(0))) for skill in SKILLS]
    return markdown_table(["skill", "prompt", "a right answer"], [[t.skill, t.prompt, t.answer] for t in examples])


def rates(results: Results, k: int) -> str:
    """Of SFT and of the losses that were measured."""
    arms = {"sigmoid": ("DPO and WRPO", f"dpo-{k}"), "ipo": ("IPO", f"ipo-{k}"), "simpo": ("SimPO", f"simpo-{k}")}
    chosen = [f"{LOSSES[loss]['learning_rate']:g} for {name} (beta {LOSSES[loss]['beta']:g})"
              for loss, (name, arm) in arms.items() if results.seeds(arm)]  # fmt: skip
    return ", ".join([f"{SFT['learning_rate']:g} for SFT", *chosen])


def status(results: Results, k: int) -> str:
    """How much has been measured, first of all."""
    seeds = len(results.seeds(f"wrpo-{WRPO_ALPHA}-{k}"))
    missing = [arm.name for arm in all_arms(k) if not results.seeds(arm.name)]
    said = f"**Measured so far: {seeds} seed{'' if seeds == 1 else 's'} of the arms that matter most"
    said += "; fewer than five decide little, and one decides nothing.**" if seeds < 5 else ".**"
    return said + (f" Not measured at all: {', '.join(missing)}." if missing else "")


def tuning_table(folder: Path) -> str:
    """What seed 0 solved of its validation prompts in each candidate setting; nothing where it was not tuned."""
    rows = []
    for path in sorted((folder / "tuning" / "seed-0" / "results").glob("*.json")):
        shares = [
            statistics.fmean(solved) for solved in json.loads(path.read_text(encoding="utf-8"))["solved"].values()
        ]
        rows.append([path.stem, f"{100 * statistics.fmean(shares):.1f}"])
    return markdown_table(["setting (loss-beta-rate-alpha)", "validation prompts solved (%)"], rows) if rows else ""


def write_report(results: Results, abouts: list[dict[str, Any]], size: Size, folder: Path, path: Path) -> None:
    """The document and, beside it, the picture of its claims."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(results, abouts, size, tuning_table(folder)), encoding="utf-8")
    draw_claims(path)


def document(results: Results, abouts: list[dict[str, Any]], size: Size, tuning: str) -> str:
    k = size.sources
    names = [arm.name for arm in all_arms(k)]
    abouts = [about for about in abouts if about["seed"] in {seed for seed, _ in results.records}]
    sources = [f"source-{name}" for name in SOURCES]
    fields = {
        "claims": claim_table(results, k),
        "arms": arm_table(results, names, f"sft-{k}"),
        "sources": arm_table(results, ["target", *sources], "target"),
        "models": model_table(),
        "tuning": tuning,
        "status": status(results, k),
        "about": "\n".join(f"- {line}" for line in dict.fromkeys(_about(about) for about in abouts)),
        "times": times(results, abouts),
        "commands": "\n".join(dict.fromkeys(about["command"] for about in abouts)),
        "prompts": size.prompts, "held_out": size.held_out, "k": k, "own": f"{100 * OWN_SHARE:.0f}",
        "epochs": SFT["num_train_epochs"], "rates": rates(results, k), "skills": skill_table(),
        "triples": _triples(results, k), "alpha": WRPO_ALPHA,
    }  # fmt: skip
    return Path(__file__).with_name("fusion.md.in").read_text(encoding="utf-8").format(**fields)


def _about(about: dict[str, Any]) -> str:
    return f"seed {about['seed']}: {about['date']}, {about['machine']}, {about['versions']}"


def _triples(results: Results, k: int) -> str:
    counts = [results.records[seed, f"dpo-{k}"]["rows"] for seed in results.seeds(f"dpo-{k}")]
    return "none yet" if not counts else f"{min(counts)} to {max(counts)}"


def times(results: Results, abouts: list[dict[str, Any]]) -> str:
    """Minutes of processor time a seed: the models, and the answers, training and tests of the arms."""
    arms: Counter[int] = Counter()
    for (seed, _), record in results.records.items():
        arms[seed] += record["cpu_seconds"]
    models = {about["seed"]: about["model_seconds"] for about in abouts}
    return ", ".join(f"seed {s}: {models[s] / 60:.1f} + {arms[s] / 60:.1f} min" for s in sorted(arms))


def read_abouts(folder: Path) -> list[dict[str, Any]]:
    """What each seed says about itself, and the processor time of its models."""
    return [
        json.loads(path.read_text(encoding="utf-8")) | {"model_seconds": model_seconds(path.parent)}
        for path in sorted(folder.glob("seed-*/about.json"))
    ]
