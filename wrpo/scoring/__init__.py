"""Rewards of answers; `wrpo score` is `command.run`.

settings.py      which answers, by which scorer
candidates.py    answers to be scored, read as a stream
reward_model.py  a sequence classification model      judge.py  a language model that is asked for a number
verdict.py       the number in what it replies        verifier.py  a Python function
scoring.py       every answer once, its reward appended
command.py       `wrpo score`
"""

from __future__ import annotations
