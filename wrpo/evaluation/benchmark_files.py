"""Answers in the files that the paper's own benchmarks read, for use where their judges are at hand.

AlpacaEval 2 (tatsu-lab/alpaca_eval 0.6.6, commit cd543a1): `alpaca_eval --model_outputs FOLDER/model_outputs.json`

    [{"instruction": the prompt, "output": the answer, "generator": the model's name}, ...]

Answers are joined with the baseline's by the instruction's exact text.

Arena-Hard (lmarena/arena-hard-auto, commit 196f6b8, since whose April 2025 v0.1 has the form of v2.0): copy the files
into its data/BENCHMARK/ and run its gen_judgment.py with the names of the models in `model_list`

    question.jsonl              {"uid", "category", "cluster", "prompt"}
    model_answer/MODEL.jsonl    {"uid", "ans_id", "model", "messages": [user's, {"role": "assistant", "content":
                                {"answer": text}}], "tstamp"}

Its style control wants a field `metadata` too, which its own utils/add_markdown_info.py adds.

Both judge one answer a prompt to a single user turn: of several samples the first is written, and a conversation is
refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from wrpo.rows.json_lines import write_json_lines
from wrpo.user_error import UserError

from .answers import Answer

CATEGORY = "arena-hard-v0.1"  # which judge's prompt and baseline (GPT-4-0314, the paper's) Arena-Hard takes


def write_alpaca_eval(answers: Iterable[Answer], folder: Path) -> list[Path]:
    """FOLDER/MODEL/model_outputs.json for each model; returns the paths."""
    paths = []
    for model, first in _first_samples(answers).items():
        path = folder / file_name(model) / "model_outputs.json"
        outputs = [
            {"instruction": _instruction(answer), "output": answer.response, "generator": model} for answer in first
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(outputs, indent=1, ensure_ascii=False), encoding="utf-8")
        paths.append(path)
    return paths


def write_arena_hard(answers: Iterable[Answer], folder: Path) -> list[Path]:
    """FOLDER/question.jsonl and FOLDER/model_answer/MODEL.jsonl; returns the paths."""
    questions: dict[str, dict] = {}
    paths = []
    for model, first in _first_samples(answers).items():
        for answer in first:
            prompt = _instruction(answer)
            questions[answer.prompt_id] = {
                "uid": answer.prompt_id,
                "category": str(answer.fields.get("category", CATEGORY)),
                "cluster": str(answer.fields.get("cluster", "")),
                "prompt": prompt,
            }
        paths.append(folder / "model_answer" / f"{file_name(model)}.jsonl")
        write_json_lines(paths[-1], map(_arena_hard_answer, first))
    write_json_lines(folder / "question.jsonl", questions.values())
    return [folder / "question.jsonl", *paths]


def file_name(model: str) -> str:
    """The model's name without what a file's name cannot hold: both benchmarks read the name off the path."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in model)


def _arena_hard_answer(answer: Answer) -> dict:
    name = file_name(answer.model)
    key = hashlib.sha256(f"{answer.prompt_id} {name} {answer.response}".encode()).hexdigest()
    return {
        "uid": answer.prompt_id,
        "ans_id": key[:22],
        "model": name,
        "messages": [
            {"role": "user", "content": _instruction(answer)},
            {"role": "assistant", "content": {"answer": answer.response}},
        ],
        "tstamp": time.time(),
    }


def _first_samples(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """For each model its answer with the lowest sample number to each prompt, in the order of the prompts."""
    first: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        held = first.setdefault(answer.model, {}).setdefault(answer.prompt_id, answer)
        if answer.sample < held.sample:
            first[answer.model][answer.prompt_id] = answer
    names: dict[str, str] = {}
    for model in first:
        other = names.setdefault(file_name(model), model)
        if other != model:
            raise UserError(
                f"models {other!r} and {model!r} would share the file name {file_name(model)!r}: rename one model"
            )
    return {model: list(by_prompt.values()) for model, by_prompt in first.items()}


def _instruction(answer: Answer) -> str:
    prompt, tools = answer.prompt, answer.asked.tools
    if not isinstance(prompt, str) or tools:
        roles = [message["role"] for message in answer.asked.messages] + ["tools"] * bool(tools)
        raise UserError(
            f"prompt {answer.prompt_id!r}: the benchmarks take a single user turn, got {', '.join(roles)}. Leave "
            "such prompts out of the export"
        )
    return prompt
