"""The forms in which people hold preference and fine-tuning data, each read by one small function.

    pair            prompt, chosen, rejected (TRL, UltraFeedback; LLaMA-Factory with `conversations` or `instruction`)
    released        prompt, chosen: [source_1 .. source_K, target], rejected: [target] (the paper's data)
    explicit        prompt, source_chosen, target_chosen (either may be missing), rejected
    example         prompt, responses, role: source | target | rejected for each
    reference       prompt, reference, chosen, rejected (TPO): the gold answer is a source
    messages        messages, rejected_response or rejected_messages (ms-swift)
    scored          prompt, all_generated_responses, all_rm_scores (SimPO): best and worst
    ranked          prompt or context, completions: [{rank, completion, reward}] (NeMo): best and worst
    preferred       context, response1, response2, overall_preference (HelpSteer3)

and for supervised fine-tuning the best answer of these, and

    messages | conversations: [{from, value}] | instruction, input, output | prompt, completion | prompt, response

Each field of responses holds one or several. A prompt is text (a user's turn), a message or a list of messages. A
response is text, an assistant's message, or messages that end with one and repeat the prompt before it; where there is
no prompt beside it, that is the prompt. So is what two texts begin with, in a row without a column `prompt`. Messages
may be JSON text. The text of a column `system` is a system message before the prompt of every form.

Columns beside them, a number or name for each response that they speak of: `source_weight`, `rejected_weight` (shares
that sum to 1; default: equal ones), `source_model`, `rejected_model`, `source_reward`, `target_reward`,
`rejected_reward`, `score_chosen`, `score_rejected`, `ref_chosen_logps`, `ref_rejected_logps` (nats, sums over the
response); and for all responses of the row `ref_logp`, `source_logp`, the mean log-prob a token under each of M models,
and `cut`, whether a response ends before its model had ended it: it is trained without an end. `finish_reason` says the
same in a server's words. Two columns that contradict each other are refused.

A row with scores of all its answers and also `chosen` and `rejected`, as SimPO's data sets have it, is read as the pair
that they are, or with `from_scores` by its scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from wrpo.rows.errors import DataError, shown

from . import answer, chosen, scored
from .columns import with_columns, with_shares
from .response import Reading


class Form(NamedTuple):
    needs: tuple[str, ...]
    read: Callable[[dict], Reading]


PAIR = Form(("chosen", "rejected"), chosen.chosen)
ANSWER = Form(("prompt", "response"), answer.response)
USUAL = {"preference": PAIR, "sft": ANSWER}

_BY_NAME = (
    Form(("responses", "role"), chosen.example),
    Form(("source_chosen", "rejected"), chosen.explicit),
    Form(("target_chosen", "rejected"), chosen.explicit),
    Form(("reference", "chosen", "rejected"), chosen.with_reference),
    PAIR,
    Form(("messages", "rejected_response"), chosen.rejected_beside),
    Form(("messages", "rejected_messages"), chosen.rejected_beside),
)
_ANSWERS = (
    Form(("source_chosen",), chosen.explicit),
    Form(("chosen",), chosen.chosen),
    Form(("messages",), answer.messages),
    Form(("conversations",), answer.conversations),
    Form(("instruction", "output"), answer.output),
    Form(("prompt", "completion"), answer.completion),
    ANSWER,
)


# Fields that say of their responses which are better: a row that is read by some of them has no others.
_LABELLED = ("source_chosen", "target_chosen", "chosen", "rejected", "rejected_response", "rejected_messages")

_SCORED = (
    (("all_generated_responses", "all_rm_scores"), scored.generated),
    (("completions",), scored.ranked),
    (("response1", "response2", "overall_preference"), scored.preferred),
)
_BEST_AND_WORST = tuple(Form(needs, partial(read, every=False)) for needs, read in _SCORED)
_ALL_BY_SCORE = tuple(Form(needs, partial(read, every=True)) for needs, read in _SCORED)


def read_form(row: dict, stage: str, from_scores: bool) -> Reading:
    """The prompt and the responses of a row, with shares and everything that its columns say of them.

    Raises:
        DataError: a row in none of the forms, naming the nearest, or in two of them; a field that its form cannot be
            read from.
    """
    forms = _ALL_BY_SCORE + _BY_NAME if from_scores else _BY_NAME + _BEST_AND_WORST
    forms += _ANSWERS if stage == "sft" else ()
    form = next((form for form in forms if all(row.get(name) is not None for name in form.needs)), None)
    if form is None:
        raise _unknown(row, forms, USUAL[stage])
    prompt, responses = form.read(row)
    _refuse_second_form(row, {response.field.partition("[")[0] for response in responses})
    return prompt, with_shares(with_columns(row, responses))


def _refuse_second_form(row: dict, read: set[str]) -> None:
    """Raises DataError where responses would vanish: those of a field that is not of the form that was read."""
    if read.isdisjoint((*_LABELLED, "responses")):
        return
    for name in _LABELLED:
        if row.get(name) and name not in read:
            expected = f"nothing beside {' and '.join(map(repr, sorted(read)))}, as which the row is read"
            raise DataError(expected, shown(row[name]), "Write the row in one form; leave the other out.", field=name)


def _unknown(row: dict, forms: Iterable[Form], usual: Form) -> DataError:
    """An error that names the form of which most is there; `usual` where no other has more."""
    there = {name for name, value in row.items() if value is not None}
    nearest = max((usual, *forms), key=lambda form: len(there.intersection(form.needs)) / len(form.needs))
    lacking = [name for name in nearest.needs if name not in there]
    got = f"fields {sorted(map(str, there))}"
    if len(there) < len(row):
        got += f", without a value {sorted(map(str, row.keys() - there))}"
    todo = (
        f"The nearest form has {', '.join(map(repr, nearest.needs))}: add or rename "
        f"{' and '.join(map(repr, lacking))}, or drop the row."
    )
    return DataError("a row in a known form", got, todo, field=lacking[0])
