"""One seed from nothing to its results; what is on the disk is not made again.

models/NAME/          the sources and the target, trained
sources.jsonl         the sources' scored answers to the fusion prompts
sft-K/                the target after SFT on the answers of K sources
target-K.jsonl        its scored answers to the prompts that gave no SFT row
results/ARM.json      which held-out prompts the arm solved, its training log, its time
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from wrpo.building import BuildSettings, Built, build_rows
from wrpo.rows.json_lines import write_json_lines
from wrpo.user_error import UserError

from .arms import SFT, WEIGHT_TEMPERATURE, Arm, copied, train_preference, train_sft
from .models import SOURCES, TARGET, ModelSpec, pretrain
from .sampling import answers
from .skills import Task, distinct, score

Model = tuple[Any, PreTrainedTokenizerFast]


@dataclass(frozen=True)
class Size:
    """How much of everything. prompts, held_out: a skill; effort: share of the pre-training steps; sources: of four."""

    prompts: int = 600
    held_out: int = 200
    effort: float = 1.0
    sources: int = 4


FULL = Size()
QUICK = Size(prompts=120, held_out=60, effort=0.25)


def write_whole(path: Path, text: str) -> None:
    """All of the file or nothing, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def model_seconds(folder: Path) -> float:
    """Processor time of the models in a seed's folder."""
    return sum(float(path.read_text(encoding="utf-8")) for path in folder.rglob("finished"))


class SeedRun:
    """The models, answers and arms of one seed, in one folder."""

    def __init__(self, folder: Path, seed: int, size: Size, held_out: str = "test"):
        self.folder, self.seed, self.size, self.held_out = folder, seed, size, held_out
        self.order = random.Random(f"sources {seed}").sample(sorted(SOURCES), size.sources)
        self.prompts = distinct("train", size.prompts, random.Random(f"prompts {seed}"))
        self.asked = distinct(held_out, size.held_out, random.Random(f"held out {seed}"))
        self.loaded: dict[str, Model] = {}
        self.answered: dict[Path, list[dict]] = {}
        self.chosen: dict[tuple[int, bool], Built] = {}

    # -- models and their answers -------------------------------------------------------------------------------------

    def model(self, name: str, make: Callable[[], Model]) -> Model:
        """The model of that name: in memory, on the disk, or made now and put there."""
        if name not in self.loaded:
            folder = self.folder / name
            if not (folder / "finished").exists():
                began = time.process_time()
                model, tokenizer = make()
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                write_whole(folder / "finished", f"{time.process_time() - began:.1f}")  # processor seconds
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            self.loaded[name] = (model, PreTrainedTokenizerFast.from_pretrained(folder))
        return self.loaded[name]

    def pretrained(self, name: str) -> Model:
        spec: ModelSpec = TARGET if name == "target" else SOURCES[name]
        spec = spec._replace(steps=max(1, round(self.size.effort * spec.steps)))
        return self.model(f"models/{name}", lambda: pretrain(spec, self.seed, name))

    def candidates(self, path: Path, models: dict[str, Model], tasks: list[Task]) -> list[dict]:
        """Scored answers of these models to these tasks, in the form that `wrpo.building` reads."""
        if not path.exists():
            set_seed(self.seed)  # so that a run that continues draws what the uninterrupted one draws
            rows = [
                {"prompt_id": task.prompt, "prompt": task.prompt, "model": name, "sample": k, "response": said}
                | {"reward": score(task, said)}
                for name, (model, tokenizer) in models.items()
                for task, several in zip(
                    tasks,
                    answers(model, tokenizer, [t.prompt for t in tasks], sample=True, title=f"answers of {name}"),
                    strict=True,
                )
                for k, said in enumerate(several)
            ]
            write_json_lines(path, rows)
        if path not in self.answered:
            self.answered[path] = [json.loads(line) for line in path.read_bytes().splitlines()]
        return self.answered[path]

    def source_answers(self, count: int) -> list[dict]:
        """Of the first `count` sources in this seed's order."""
        path = self.folder / "sources.jsonl"
        models = {} if path.exists() else {name: self.pretrained(name) for name in self.order}
        rows = self.candidates(path, models, self.prompts)
        return [row for row in rows if row["model"] in self.order[:count]]

    def fine_tuned(self, count: int, settings: Mapping[str, Any] = SFT) -> Model:
        """The target after SFT on `count` sources; settings other than `SFT` are for choosing them."""
        name = f"sft-{count}" if settings is SFT else f"sft-{count}-{settings['learning_rate']:g}"
        rows, target = self.source_answers(count), self.pretrained("target")
        return self.model(name, lambda: self.fine_tune(target, rows, settings))

    def fine_tune(self, target: Model, rows: list[dict], settings: Mapping[str, Any]) -> Model:
        built = build_rows(rows, BuildSettings(stage="sft", seed=self.seed))
        model, tokenizer = copied(target[0]), target[1]
        train_sft(model, tokenizer, built.sft, self.seed, settings)
        return model, tokenizer

    def built(self, count: int, keeps_each: bool) -> Built:
        """SFT rows and triples from the answers of `count` sources and of the target fine-tuned on them."""
        if (count, keeps_each) not in self.chosen:
            self.chosen[count, keeps_each] = self.build(count, keeps_each)
        return self.chosen[count, keeps_each]

    def build(self, count: int, keeps_each: bool) -> Built:
        sources = self.source_answers(count)
        waiting = {row["prompt"] for row in build_rows(sources, BuildSettings(stage="sft", seed=self.seed)).prompts}
        tasks = [task for task in self.prompts if task.prompt in waiting]
        own = self.candidates(self.folder / f"target-{count}.jsonl", {"target": self.fine_tuned(count)}, tasks)
        settings = BuildSettings(seed=self.seed)
        if keeps_each and count > 1:
            settings = replace(settings, num_sources=count, weight_temperature=WEIGHT_TEMPERATURE)
        return build_rows([*sources, *own], settings)

    # -- arms ---------------------------------------------------------------------------------------------------------

    def run(self, arm: Arm) -> None:
        """The arm's result, unless it is on the disk; one that was made with other settings is refused."""
        path = self.folder / "results" / f"{arm.name}.json"
        settings = {"size": asdict(self.size), "sft": dict(SFT), "arm": dict(arm.settings)}
        if path.exists():
            was = json.loads(path.read_text(encoding="utf-8")).get("settings")
            if was != settings:
                raise UserError(f"{path}: made with {was}, asked for is {settings}. Name another folder with --out.")
            return
        started, began, before = time.perf_counter(), time.process_time(), model_seconds(self.folder)
        (model, tokenizer), facts = self.trained(arm)
        solved, worth = self.judge(model, tokenizer, arm.name)
        record = {"arm": arm.name, "seed": self.seed, "solved": solved, "score": worth, "order": self.order, **facts}
        record["settings"] = settings
        record["seconds"] = round(time.perf_counter() - started, 1)
        record["cpu_seconds"] = round(time.process_time() - began - (model_seconds(self.folder) - before), 1)
        write_whole(path, json.dumps(record))

    def trained(self, arm: Arm) -> tuple[Model, dict[str, Any]]:
        """The arm's model, and what is to be said about its training."""
        if arm.stage == "target":
            return self.pretrained("target"), {}
        if arm.stage == "source":
            return self.pretrained(arm.name.removeprefix("source-")), {}
        if arm.stage == "sft":
            return self.fine_tuned(arm.sources, arm.settings or SFT), {}
        start, tokenizer = self.fine_tuned(arm.sources)
        model = copied(start)
        built = self.built(arm.sources, arm.keeps_each)
        if arm.stage == "sft-all":
            built_all = build_rows(self.source_answers(arm.sources), BuildSettings(sft_share=1.0, stage="sft"))
            preferred = {row["prompt"] for row in built.triples}
            rows = [row for row in built_all.sft if row["prompt"] in preferred]
            return (model, tokenizer), {"log": train_sft(model, tokenizer, rows, self.seed), "rows": len(rows)}
        log = train_preference(model, tokenizer, built.triples, self.seed, arm.settings)
        return (model, tokenizer), {"log": log, "rows": len(built.triples), "report": str(built.report)}

    def judge(self, model: Any, tokenizer: Any, name: str) -> tuple[dict[str, list[int]], float]:
        """Which held-out prompts of each skill are solved by the greedy answer, and the mean score."""
        said = answers(model, tokenizer, [task.prompt for task in self.asked], sample=False, title=f"test of {name}")
        scores = [score(task, text) for task, (text,) in zip(self.asked, said, strict=True)]
        solved: dict[str, list[int]] = {}
        for task, worth in zip(self.asked, scores, strict=True):
            solved.setdefault(task.skill, []).append(int(worth == 1.0))
        return solved, sum(scores) / len(scores)
