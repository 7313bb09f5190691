"""From scored candidate answers to training data: the SFT split and the preference triples of WRPO.

A candidate is one model's answer to one prompt with a reward model's or judge's score:

    {"prompt_id": str, "prompt": str or messages, "model": str, "sample": int, "response": str, "reward": float}

and with it, where `wrpo sample` and `wrpo score` wrote the row, "finish_reason" and "scorer". Answers that were cut are
left out, and rewards of two scorers are refused, unless the settings say otherwise; rows of which a response is cut
list in `cut` which, and training ends it without the end-of-turn token.

The target's own answers carry the model name `target`. A seeded hash of its id sends each prompt to one of two parts
(arXiv:2412.03187):

    SFT part (a third)   source_chosen: the best answer of any source model
    triples (the rest)   source_chosen, and with it target_chosen and rejected: the target's best and worst answer;
                         with `ties` source, where these are worth the same, source_chosen and rejected alone

    settings.py   what can be chosen, each setting with its meaning
    candidate.py  one row, checked          grouping.py  rows of one prompt together, in constant memory
    answers.py    one prompt's answers      limits.py    which of them are too long or say the same
    scorers.py    whose rewards they are    choice.py    the row that a prompt gives
    pipeline.py   from first row to last    report.py    what became of them
    picture.py    the same, drawn           writing.py   whole files or none
    command.py    `wrpo build`

The same candidates and seed give the same files, byte for byte, in any order of the rows and on any number of machines.
"""

from __future__ import annotations

from .pipeline import Built, Written, build, build_rows
from .report import BuildReport
from .settings import BuildFiles, BuildSettings

__all__ = ["BuildFiles", "BuildReport", "BuildSettings", "Built", "Written", "build", "build_rows"]
