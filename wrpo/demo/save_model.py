"""python -m wrpo.demo.save_model FOLDER

Writes the demo's model and tokenizer as a folder that every `from_pretrained` loads, and so every command of `wrpo`:
538 MB in float32. A folder that is already whole stays as it is.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers.utils import logging

from wrpo.user_error import UserError

from . import model as demo_model

LAST_WRITTEN = "tokenizer.json"


def save_model(folder: Path) -> None:
    """The model first, then the tokenizer in a folder beside it, moved into place: what is there is whole."""
    if (folder / LAST_WRITTEN).exists():
        return
    model, tokenizer = demo_model.load()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "unfinished")
    for file in sorted((folder / "unfinished").iterdir(), key=lambda file: file.name == LAST_WRITTEN):
        file.rename(folder / file.name)
    (folder / "unfinished").rmdir()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    try:
        save_model(Path(arguments[0]))
    except UserError as error:
        print(f"wrpo.demo.save_model: {error}", file=sys.stderr)
        return 2
    print(f"model  {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
