"""What a judge's reply says is read right, or not at all."""

from __future__ import annotations

import time

import pytest

from wrpo.scoring.verdict import verdict

READ = {
    "8": 8,
    "**8**": 8,
    " 8.5. ": 8.5,
    "8/10": 8,
    "8 out of 10": 8,
    r"\boxed{8}": 8,
    '{"score": 8}': 8,
    "Score: 8": 8,
    "SCORE = 8": 8,
    "Score (1-10): 8": 8,
    "Score (out of 10): 8": 8,
    "Score on a scale of 1 to 10: 8": 8,
    "**Score (1 to 10): 8**": 8,
    "Score: 8 / 10.0": 8,
    "Score: [[8]]": 8,
    "Score：8": 8,
    "The score is 8.": 8,
    "### Score\n\n8 of 10 points": 8,
    "- Final rating: **8**/10.": 8,
    "```\nScore: 8\n```": 8,
    '"Score: 8"': 8,
    "It names 3 of 5 birds in 12 words. Score: 8": 8,
    "Score: 8. It names 3 of 5 birds.": 8,
    "Score: 8\n(1 is useless, 10 is perfect)": 8,
    "score 3 at first, but then\nScore: 8": 8,
    "Accuracy: 3\nStyle: 9\nOverall score: 8": 8,
    'The answer says "Score: 10".\nScore: 8': 8,
    "**Score: 8**\nAs said:\nScore: 8/10": 8,
    "<think>Score: 1 is useless</think>Score: 8": 8,
    "The scale: Score: 1\n</think>\n8": 8,
    "<think>a <think> b</think> Score: 1\n</think>Score: 8": 8,
    "[THINK]Score: 1[/THINK]8": 8,
    '{"score": 8, "reason": "It names 3 of 5. Score: 2"}': 8,
    '{"reason": "Score: 2 is too low", "score": 8}': 8,
    '```json\n{\n  "reason": "short",\n  "score": 8\n}\n```': 8,
    'Here it is: {"Overall_Score": "8/10"} as asked.': 8,
    '{"criteria": [{"name": "style", "score": 3}, {"name": "facts", "score": 9}], "finalScore": 8}': 8,
    '[{"verdict": {"rating": 8.0, "out_of": 10}}]': 8,
    '{"score": 8, "scale": "1-10", "max_score": "10"}': 8,
    '{"answer": "x"}\nScore: 8': 8,
    '{"score": 8}\nScore: 8/10': 8,
}
UNREAD = {
    "": "no score",
    "I would rather not.": "no score",
    "Score: eight": "no score",
    "10 reasons": "no score",
    "4/5": "no score",
    "5 out of 5": "no score",
    "Score: 4/5": "no score",
    "Score: 8/100": "no score",
    "Score: 80%": "no score",
    "Score (1-5): 4": "no score",
    "Score (0-10): 8": "no score",
    "Score: 7-8": "no score",
    "Score: 8 or 9": "no score",
    "8 or 9": "no score",
    "8/10 or 9/10": "no score",
    "8\n9": "no score",
    "Score: 8 (9 if it were shorter)": "no score",
    "Score: 8. 9 would be kind": "no score",
    "Score: 8,5": "no score",
    "Score: 7½": "no score",
    "Score: 10,000": "no score",
    "Score: 1e1": "no score",
    "Score: ~8": "no score",
    "Score: >8": "no score",
    "Score: 1-10": "no score",
    "Score: 1 is useless. Let me see": "no score",
    "Accuracy score: 9\nStyle score: 3": "no score",
    'It claims:\n"Score: 10"\nwhich is nonsense.': "no score",
    "Score: 8\nScore: 9": "several scores",
    "Score: 8. Hm, no.\n**Final score:** 3": "several scores",
    '{"score": 8, "score": 9}': "several scores",
    '{"score": 8}\n{"score": 9}': "several scores",
    '{"criteria": [{"score": 3}, {"score": 9}]}': "several scores",
    '{"score": 8}\nScore: 9': "several scores",
    '{\n"score": 4,\n"scale": 5\n}': "no score",
    '{"score": "4/5"}': "no score",
    '{"score": 4, "scale": "1 to 5"}': "no score",
    '{"score": 8, "max_score": 100}': "no score",
    '{"score": "eight"}': "no score",
    '{"score": true}': "no score",
    '{"score": null}': "no score",
    '{"scores": {"style": 8, "facts": 8}}': "no score",
    '{"score": 11}': "not on its scale",
    '{"score": 1e999}': "no score",
    "Score: 11": "not on its scale",
    "Score: -1": "not on its scale",
    "0": "not on its scale",
    "<think>The scale: Score: 1\nLet me see whether": "ends inside its thoughts",
    "Score: 8 <thinking>or": "ends inside its thoughts",
}


@pytest.mark.parametrize(("reply", "expected"), READ.items(), ids=READ)
def test_a_score_that_stands_by_itself_is_read(reply, expected):
    assert verdict(reply, 1, 10) == expected


@pytest.mark.parametrize(("reply", "words"), UNREAD.items(), ids=UNREAD)
def test_what_is_no_clear_score_on_the_scale_is_not_read(reply, words):
    with pytest.raises(ValueError, match=words):
        verdict(reply, 1, 10)


@pytest.mark.parametrize(
    ("reply", "scale", "expected"),
    [
        ("Score: 4/5", (1, 5), 4),
        ("Score (0-1): 0.25", (0, 1), 0.25),
        ("Score: -3", (-5, 5), -3),
        ("Score (-5 to 5): -3", (-5, 5), -3),
        ("Score: 80/100", (0, 100), 80),
        ("Score: 8/10", (1, 100), None),
    ],
)
def test_the_scale_is_the_judges_own(reply, scale, expected):
    if expected is None:
        with pytest.raises(ValueError, match="no score"):
            verdict(reply, *scale)
    else:
        assert verdict(reply, *scale) == expected


PATTERNS = [
    ("rating: 4", r"rating: (\d+)", 4),
    ("rating: 4/10. rating: 4", r"rating: (\d+)", 4),
    ("rating-4 out of 10", r"rating-(\d+)", 4),
    ("<rating>4</rating>", r"<rating>(\d+)</rating>", 4),
    ('{"style": 3, "rating": 4, "length": 5}', r'"rating": (\d+)', 4),
    ("<think>rating: 3</think>rating: 4", r"rating: (\d+)", 4),
    ("4", r"rating: (\d+)", "no score"),
    ("rating: 4, rating: 5", r"rating: (\d+)", "several scores"),
    ("rating: 10", r"rating: (\d)", "longer number"),
    ("rating: 10", r"(\d)$", "longer number"),
    ("rating: 4.5", r"rating: (\d+)", "longer number"),
    ("rating: -4", r"rating:.*?(\d+)", "longer number"),
    ("rating: 4/5", r"rating: (\d+)", "another scale"),
    ("rating: **4**/5", r"rating: \*\*(\d+)", "another scale"),
    ("rating: 4 out of 5", r"rating: (\d+)", "another scale"),
    ("rating: 40%", r"rating: (\d)", "longer number"),
    ("rating: 8-10", r"rating: (\d+)", "range"),
    ("rating: 8-9", r"(\d+)$", "range"),
    ("rating: 8 or 9", r"rating: (\d+)", "range"),
    ("rating: four", r"rating: (\w+)", "not a number"),
    ("rating", r"rating(\d+)?", "not a number"),
]


@pytest.mark.parametrize(("reply", "pattern", "expected"), PATTERNS)
def test_a_pattern_finds_one_whole_number_on_the_scale_or_none(reply, pattern, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            verdict(reply, 0, 10, pattern)
    else:
        assert verdict(reply, 0, 10, pattern) == expected


@pytest.mark.parametrize("piece", ["Score" + " " * 1000, "Score:\n", "\n", "<think>"])
def test_no_reply_takes_long_to_read(piece):
    reply = piece * (100_000 // len(piece)) + "x"
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"no score|inside its thoughts"):
        verdict(reply, 1, 10)
    assert time.perf_counter() - start < 5  # 0.1 s; in a time that grows with the square of the length, minutes
