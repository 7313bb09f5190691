"""Answers of any number of models to the same prompts; `wrpo sample` is `command.run`.

sources.py        which models answer, from a YAML file
prompts.py        what they are asked: prompts, checked, and the requests made of them
files.py         the files that paths and globs name, each once
server.py         a model behind an OpenAI-compatible server: time-outs, retries, rate limits
local_model.py    a model that transformers runs in this process; vllm_model.py: one that vLLM does
memory.py        gives back what a model no longer needs
asking.py         every request once, its answer appended at once
tally.py          what became of the requests: progress bar, failures, summary
command.py        the command line
"""

from __future__ import annotations
