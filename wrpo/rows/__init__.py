"""Rows on disk, each command's first and last step.

reading.py    rows of files and data sets      files.py      the files that paths and globs name, each once
json_lines.py rows as lines                    appending.py  rows appended to a file that one process holds
messages.py   a prompt, checked                candidate.py  an answer, checked
errors.py     what is wrong with a row         shards.py     which prompts are whose, on several machines
lock.py       one process at a time            softmax.py    shares from rewards
numbers.py    how large a number may be
"""

from __future__ import annotations
