"""Before and after: the table, a few answers side by side, and the picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from wrpo.picture_style import MODELS, as_shares, can_draw, grouped_bars, legend_above, percent, picture

from .model import Answer
from .skills import SKILLS, Task, score


class Judged(NamedTuple):
    """An answer to a held-out prompt and what the verifier gives for it; only 1 is solved."""

    task: Task
    text: str
    score: float

    @property
    def solved(self) -> bool:
        return self.score == 1


def judge(tasks: list[Task], answers: list[Answer]) -> list[Judged]:
    """An answer that the length limit cut is worth nothing: the model would have gone on."""
    return [
        Judged(task, answer.text.strip(), 0.0 if answer.cut else score(task, answer.text))
        for task, answer in zip(tasks, answers, strict=True)
    ]


def answer_rows(judged: list[Judged], model: str, sample: int) -> list[dict[str, Any]]:
    """Scored answers in the form of `wrpo score`, which `wrpo eval` reads."""
    return [
        {
            "prompt_id": j.task.prompt,
            "prompt": j.task.prompt,
            "skill": j.task.skill,
            "model": model,
            "sample": sample,
            "response": j.text,
            "reward": j.score,
        }
        for j in judged
    ]


def summary(judged: list[Judged]) -> dict[str, dict[str, float]]:
    """For each skill and for "all": prompts, how many are solved, and the mean score."""
    groups = {skill: [j for j in judged if j.task.skill == skill] for skill in SKILLS} | {"all": judged}
    return {
        name: {
            "prompts": len(group),
            "solved": sum(j.solved for j in group),
            "mean_score": sum(j.score for j in group) / len(group),
        }
        for name, group in groups.items()
        if group
    }


def table(before: list[Judged], after: list[Judged]) -> str:
    """Solved held-out prompts and mean score of each skill."""
    lines = [f"{'skill':<10}{'prompts':>8}   {'solved before -> after':<24}{'mean score before -> after'}"]
    then, now = summary(before), summary(after)
    for name, a in then.items():
        b = now[name]
        solved = f"{a['solved']:>7} -> {b['solved']}"
        lines.append(f"{name:<10}{a['prompts']:>8}   {solved:<24}{a['mean_score']:>9.2f} -> {b['mean_score']:.2f}")
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    return "\n".join(lines)


def side_by_side(before: list[Judged], after: list[Judged], each: int = 1) -> str:
    """The first held-out prompts of each skill, whatever became of them, with both answers."""
    lines = ["Held-out prompts, answered before and after training; [x]: solved, [ ]: not.", ""]
    for skill in SKILLS:
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.task.skill == skill]
        for a, b in pairs[:each]:
            lines += [
                f"> {a.task.prompt}",
                f"  before {mark(a)} {one_line(a.text)}",
                f"  after  {mark(b)} {one_line(b.text)}",
                "",
            ]
    return "\n".join(lines)


def mark(judged: Judged) -> str:
    return "[x]" if judged.solved else "[ ]"


def one_line(text: str) -> str:
    return textwrap.shorten(" ".join(text.split()) or "(nothing)", 110, placeholder=" ...")


def draw_bars(before: list[Judged], after: list[Judged], path: Path) -> None:
    """Share of held-out prompts solved, before and after, for each skill and for all."""
    if not can_draw(path):
        return
    then, now = summary(before), summary(after)
    of, first, last = then["all"]["prompts"], then["all"]["solved"], now["all"]["solved"]
    groups = [f"{name}\n{group['prompts']} prompts" for name, group in then.items()]
    bars = {
        name: [group["solved"] / group["prompts"] for group in groups_of.values()]
        for name, groups_of in (("before", then), ("after WRPO", now))
    }
    with picture(path, f"{first} of {of} held-out prompts solved before, {last} after", height=3.8) as figure:
        ax = figure.subplots()
        grouped_bars(ax, groups, bars, MODELS, number=percent)
        ax.set_ylim(0, 1.08)
        as_shares(ax.yaxis)
        legend_above(figure)
