"""What a model is worth on prompts and triples that training never saw; `wrpo eval` is `command.run`.

scores = scores_of(read_answers(["before.jsonl", "after.jsonl"]))     as `wrpo sample` and `wrpo score` write them
compare(scores, baseline="before", solved_at=1.0)                    solved prompts, mean scores, wins
implicit_reward_accuracy(policy, reference, rows, ...)               of `response_logps` on held-out triples
write_alpaca_eval(answers, folder), write_arena_hard(answers, folder)
"""

from __future__ import annotations
