"""A run says what it is before its first step, and logs ten times however short it is."""

from __future__ import annotations

import datasets
import pytest
from tiny_models import tiny_rows
from tiny_runs import training_lines, wrpo_trainer

from wrpo.training.start_report import data_size


def test_a_run_says_data_steps_kernel_loss_and_reference(tmp_path, capsys):
    wrpo_trainer(tmp_path, alpha=0.4, max_steps=1, budget_bytes=1 << 20).train()
    said = capsys.readouterr().err
    for words in (
        "8 rows (8 of source + target + rejected), 24 responses",
        "steps      1, each of up to 2 rows, learning rate 3e-07 (cosine)",
        "kernel     native on cpu, logits in pieces of at most 1 MiB",
        "loss       sigmoid, beta 0.01, gamma 0, alpha 0 to 0.4 (linear)",
        "reference  copy",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("sources", "form", "settings", "words"),
    [
        (0, datasets.Dataset.from_list, {"loss_type": "dpo"}, "gamma 0\n"),
        (0, list, {"loss_type": "dpo"}, "gamma 0\n"),
        (0, datasets.Dataset.from_list, {}, "gamma 0\n"),
        (1, datasets.Dataset.from_list, {"loss_type": "dpo"}, "gamma 0\n"),
        (1, list, {"alpha_schedule": "constant", "alpha": 0.3}, "gamma 0, alpha 0.3\n"),
    ],
)
def test_alpha_is_spoken_of_where_rows_have_a_source(sources, form, settings, words, tmp_path, capsys):
    wrpo_trainer(tmp_path, rows=form(tiny_rows(4, sources=sources)), max_steps=1, **settings).train()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_the_size_of_the_data_is_counted_in_the_tokens_that_go_through_the_model(form):
    rows = [
        {"prompt_ids": [1, 2, 3], "response_ids": [[4], [5, 6]], "role": ["target", "rejected"], "share": [1.0, 1.0]},
        {"prompt_ids": [1], "response_ids": [[4], [5], [6, 7]], "role": ["target", "rejected", "rejected"],
         "share": [1.0, 0.5, 0.5]},
    ]  # fmt: skip
    size = data_size(form(rows))
    assert size.rows == {"chosen + rejected": 1, "chosen + 2 rejected": 1}
    assert (size.responses, size.prompt_tokens, size.response_tokens) == (5, 2 * 3 + 3 * 1, 3 + 4)
    assert "2 rows" in str(size)
    assert "16 tokens in padded rows, 56% of them prompt" in str(size)


@pytest.mark.parametrize(("steps", "lines"), [(4, 4), (12, 12), (25, 12)])
def test_a_short_run_logs_at_least_ten_times_or_every_step(steps, lines, tmp_path):
    trainer = wrpo_trainer(tmp_path, rows=tiny_rows(2), max_steps=steps, logging_steps=10)
    trainer.train()
    assert len(training_lines(trainer)) == lines


@pytest.mark.parametrize(
    ("settings", "is_warned"),
    [
        ({"max_steps": 1}, True),
        ({"max_steps": 4}, True),
        ({"max_steps": 6, "warmup_steps": 6}, True),
        ({"max_steps": 6}, False),
        ({"max_steps": 1, "warmup_steps": 0}, False),
        ({"max_steps": 1, "lr_scheduler_type": "constant"}, False),
    ],
)
def test_a_run_too_short_for_its_warm_up_is_told_so_at_its_start(settings, is_warned, tmp_path, caplog):
    trainer = wrpo_trainer(tmp_path, rows=tiny_rows(2), **settings)
    trainer.train()
    assert ("This run trains little or nothing: the learning rate is 0 in its first step" in caplog.text) is is_warned
    assert not is_warned or f"of its {settings['max_steps']} steps. Set warmup_steps to 0" in caplog.text


def test_a_stream_is_not_gone_through_for_its_size():
    assert data_size(datasets.Dataset.from_list(tiny_rows(2)).to_iterable_dataset()) is None
