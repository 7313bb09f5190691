"""Half a minute of random calls against the closed form, others every day; and proof that they would see a mistake."""

from __future__ import annotations

import pytest
from fuzz import CHECKS, Wrong, run, run_case, seed_of_the_day
from planted import PLANTED, first_seen, with_error
from planted_in_kernels import PLANTED as PLANTED_IN_KERNELS
from planted_in_kernels import seen_in

SECONDS = 30


@pytest.mark.slow
def test_half_a_minute_of_random_calls_is_right():
    assert run(seed_of_the_day(), SECONDS) >= len(CHECKS), "not even one call of each op"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(name):
    assert first_seen(name, seed=1, cases=300) is not None


@pytest.mark.parametrize("name", PLANTED_IN_KERNELS)
def test_an_error_planted_in_a_kernel_is_seen(name):
    assert next(seen_in(name, seed=1, cases=300), None) is not None


def test_a_case_is_the_same_call_every_time_and_says_how_to_repeat_it():
    reports = []
    for _ in range(2):
        with pytest.raises(Wrong) as error:
            run_case(1, 0, with_error(PLANTED["the label one too far"]))
        reports.append(str(error.value))
    assert reports[0] == reports[1]
    assert "dtype: torch." in reports[0]
    assert reports[0].endswith("repeat: python tests/kernels/fuzz.py --seed 1 --case 0")


def test_the_seed_is_the_day_or_what_is_asked_for(monkeypatch):
    monkeypatch.delenv("WRPO_FUZZ_SEED", raising=False)
    assert 20260101 < seed_of_the_day() < 99991231
    monkeypatch.setenv("WRPO_FUZZ_SEED", "17")
    assert seed_of_the_day() == 17
