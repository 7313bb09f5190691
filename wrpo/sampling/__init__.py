"""Answers of any number of models to the same prompts; `wrpo sample` is `command.run`.

settings.py       who is asked what, and how answers are drawn
sources.py        which models answer, from a YAML file
prompts.py        what they are asked: prompts, checked, and the requests made of them
prompt_ids.py     their token ids, for models that run here
served_messages.py  their messages, for servers
server.py         a model behind an OpenAI-compatible server: time-outs, retries, rate limits
refusal.py        what such a server says in the place of an answer
local_model.py    a model that transformers runs in this process; vllm_model.py: one that vLLM does
asking.py         every request once, its answer appended at once
halving.py        a batch that does not fit into memory, halved
tally.py          what became of the requests: progress bar, failures, summary
command.py        `wrpo sample`
"""

from __future__ import annotations
