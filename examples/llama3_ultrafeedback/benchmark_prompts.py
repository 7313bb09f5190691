"""python examples/llama3_ultrafeedback/benchmark_prompts.py INPUT OUTPUT.jsonl

The prompts of AlpacaEval 2 (`alpaca_eval.json`: a list of {"instruction", "dataset", ...}) or of Arena-Hard
(`question.jsonl`: {"uid", "category", "cluster", "prompt"}) as rows that `wrpo sample` and `wrpo eval` read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def prompt_row(number: int, row: dict) -> dict:
    if "instruction" in row:
        return {"prompt_id": f"alpaca-eval-{number}", "prompt": row["instruction"], "dataset": row.get("dataset", "")}
    return {"prompt_id": row["uid"], "prompt": row["prompt"], "category": row["category"], "cluster": row["cluster"]}


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    lines = [json.dumps(prompt_row(number, row), ensure_ascii=False) for number, row in enumerate(rows)]
    Path(sys.argv[2]).write_text("\n".join(lines) + "\n", encoding="utf-8")
