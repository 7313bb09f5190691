"""The code of the pages that needs another library runs as written, where that library is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
MARKED = r"<!-- not run: needs (\w+) -->\n```python\n(.*?)^```"
BLOCKS = [
    (page.name, needs, code)
    for page in sorted(DOCS.glob("*.md"))
    for needs, code in re.findall(MARKED, page.read_text(), re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("page", "needs", "code"), BLOCKS, ids=[f"{page}, {needs}" for page, needs, _ in BLOCKS])
def test_the_code_of_a_page_runs_beside_the_library_that_it_needs(page, needs, code):
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    names: dict = {}
    try:
        exec(compile(code, page, "exec", dont_inherit=True), names)
    finally:
        if needs == "trl":
            names["trl"].uninstall()
