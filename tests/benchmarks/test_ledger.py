"""A step on a GPU, counted without one: as many flops as the algebra needs, no byte more than its bounds, no wait."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ledger
from benchmarks.ledger import KINDS, PHASES, ROWS, Entry, Problem, entries, roofline
from benchmarks.suite.recording import recorded
from benchmarks.suite.scenarios import HEADS
from wrpo_kernels import linear_preference_loss

MOST_LAUNCHES = 6  # before the first product
MIB = 1 << 20


def problem(head: str, **more) -> Problem:
    return Problem(*HEADS[head], ROWS[head], **more)


def beside(step: list[Entry]) -> int:
    return sum(entry.launch.beside for entry in step)


def most_bytes(p: Problem, step: list[Entry]) -> int:
    """Each logit read and written as a delta; a float32 dW read and written by all chunks but the first, and rounded;
    ten passes over the hidden states, M positions of which N count."""
    chunks = sum(entry.phase == "logits" for entry in step)
    size = p.vocabulary * p.width
    of_weight = (8 * (chunks - 1) + 6) * size if p.kind == "trained" else 0
    return 4 * p.rows * p.vocabulary + of_weight + 20 * p.rows * (1 + p.prompt) * p.width


@pytest.mark.parametrize("budget", [64 * MIB, 1024 * MIB, 4096 * MIB])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_step_of_a_pair_stays_within_its_flops_bytes_and_launches_at_any_budget(head, kind, budget):
    for prompt in (0, 1):
        p = problem(head, kind=kind, budget=budget, prompt=prompt)
        step = entries(p)
        assert sum(entry.launch.flops for entry in step) == p.flops
        assert beside(step) <= most_bytes(p, step)
        assert sum(entry.phase == PHASES[0] for entry in step) <= MOST_LAUNCHES


@pytest.mark.parametrize("budget", [64 * MIB, 4096 * MIB])
def test_fine_tuning_computes_no_row_twice_at_any_budget(budget):
    p = problem("SmolLM2-135M", budget=budget, has_margin=False, prompt=1)
    step = entries(p)
    assert sum(entry.launch.flops for entry in step) == p.flops
    assert beside(step) <= most_bytes(p, step)
    assert sum(entry.phase == PHASES[0] for entry in step) <= MOST_LAUNCHES


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_each_fit_the_budget_stay_within_their_flops_and_bytes(kind):
    p = problem("Qwen3-0.6B", kind=kind, pairs=4, budget=1024 * MIB)
    step = entries(p)
    assert sum(entry.launch.flops for entry in step) == p.flops
    assert beside(step) <= most_bytes(p, step)


def test_on_a_large_card_every_head_of_the_suite_is_one_chunk():
    for head in HEADS:
        assert sum(entry.phase == "logits" for entry in entries(problem(head))) == 1


def test_what_nobody_told_the_host_is_waited_for():
    """So a recorded step has not waited: tensors without values raise where one would be read."""
    labels, weight = torch.empty(2, 4, dtype=torch.int64, device="meta"), torch.empty(9, 8, device="meta")
    given = {"seq_weight": torch.empty(2, device="meta"), "num_groups": 1, "beta": 0.1}
    with recorded(), pytest.raises(NotImplementedError):
        linear_preference_loss(
            torch.empty(2, 4, 8, device="meta"), weight, labels, group=torch.zeros(2).long(), **given
        )


def test_the_command_prints_the_roofline_of_every_head(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ledger"])
    ledger.main()
    out = capsys.readouterr().out
    assert all(head in out for head in HEADS) and out.count("rows of logits") == len(HEADS)


def test_what_a_card_took_is_flagged_where_it_is_more_than_a_tenth_apart(tmp_path):
    step, p = entries(problem("Qwen3-0.6B")), problem("Qwen3-0.6B")
    ms = {phase: sum(e.milliseconds for e in step if e.phase == phase) for phase in ("logits", "dW")}
    path = tmp_path / "ledger.csv"
    path.write_text(
        f"# a card\nhead,phase,ms\nQwen3-0.6B,logits,{1.09 * ms['logits']}\nQwen3-0.6B,dW,{1.2 * ms['dW']}\n"
    )
    table = list(roofline(step, p.flops, ledger.read_measured(path)["Qwen3-0.6B"]))
    assert [line.split()[0] for line in table if line.endswith("APART")] == ["dW"]
    assert "measured" in table[0]
