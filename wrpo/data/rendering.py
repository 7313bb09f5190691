"""A prompt and its responses as the text that the model reads, by the tokenizer's chat template.

    prompt    rendered with the generation prompt: generation starts exactly where it ends
    response  what the rendering of the whole conversation adds after that, up to and including the end-of-turn token

Messages, tools and options reach the template as they are (`wrpo.data.chat_template`), and what it leaves out of them
is refused or remarked (`wrpo.data.left_out`). Two things are cut: an answer that carries an end of turn in its text, as
servers may leave it there, before the first; and whitespace that a template writes after the end-of-turn token, which
no model ever generates and a log-probability summed over a response should not count.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Message

from .chat_template import ChatTemplate
from .control_tokens import until_first
from .left_out import THOUGHTS, Rendered, not_written, others, refuse_unwritten_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wrpo.data")

CUT_AT_END = "answer cut before the end of turn {!r} in its text"
CONTROL_IN_ANSWER = "control token {!r} in the text of an answer"
CONTROL_IN_PROMPT = "control token {!r} in the text of a prompt: the model reads it as one, not as words"

_OPENING = 64  # last characters of a prompt, among which its template may have opened the answer


class Rendering(NamedTuple):
    """prompt: text; whole: prompt and response text, by field; remarks: what was changed on the way, each once."""

    prompt: str
    whole: dict[str, str]
    remarks: set[str]


class Renderer:
    """Renders conversations for one tokenizer.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        template_kwargs: passed on to the chat template, e.g. {"enable_thinking": False}.

    Raises:
        DataError: a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template_kwargs)
        self._control = self._template.control

    def __call__(
        self,
        prompt: list[Message],
        responses: dict[str, Message],
        *,
        tools: list | None = None,
        chat_template_kwargs: dict | None = None,
    ) -> Rendering:
        """The prompt's text, and for each response the text of both, which starts with the prompt's.

        Args:
            prompt: messages, the last one not the assistant's.
            responses: an assistant's message for each field.
            tools: what the model may call.
            chat_template_kwargs: the row's own options; they win over those of the run.

        Raises:
            DataError: the template refuses the messages, leaves out what they say, or writes a conversation that does
                not start with its prompt.
        """
        options = chat_template_kwargs or {}
        remarks = self._control_remarks(CONTROL_IN_PROMPT, prompt)
        start = self._template.text("prompt", prompt, tools, options)
        rendered = Rendered(start, remarks)
        rendered.find_prompt(prompt)
        rendered.find_documents(self._template.documents(options))
        self._refuse_ignored(start, prompt, tools, options)
        opening = start[-_OPENING:]
        whole = {}
        for field, response in responses.items():
            answer = self._until_end(response, field, remarks)
            text = self._template.text(field, [*prompt, answer], tools, options)
            Rendered(opening + _after(start, text, field), remarks).find_answer(answer, field, opening)
            for what, other in others(answer):
                if self._template.writes_the_same(text, [*prompt, other], tools, options):
                    raise not_written(what, "none of them", field)
            whole[field] = self._until_end_of_turn(text)
        return Rendering(start, whole, remarks)

    def conversation(
        self,
        prompt: list[Message],
        response: str,
        *,
        tools: list | None = None,
        chat_template_kwargs: dict | None = None,
    ) -> tuple[str, set[str]]:
        """(the text of a prompt and its answer, to its last character, remarks), as a reward model reads them.

        A template that writes no prompts at all, for a model that judges answers alone, may leave them out.

        Raises:
            DataError: as for a rendering, but for a conversation that does not start with its prompt.
        """
        remarks = self._control_remarks(CONTROL_IN_PROMPT, prompt)
        answer: Message = {"role": "assistant", "content": response}
        if response:
            answer = self._until_end(answer, "response", remarks)
        options = chat_template_kwargs or {}
        text = self._template.text("prompt", [*prompt, answer], tools, options)
        rendered = Rendered(text, remarks)
        if self._template.writes_prompts:
            rendered.find_prompt(prompt)
            rendered.find_documents(self._template.documents(options))
            self._refuse_ignored(text, [*prompt, answer], tools, options)
        rendered.find_answer(answer, "response")
        return text, remarks

    def ends_its_turns(self, text: str) -> bool:
        """Whether a rendered conversation ends with a special token, at which generation can stop."""
        return text.endswith(self._control.all)

    def without_end(self, text: str) -> str:
        """A rendered conversation without what ends its last turn: special tokens or marks, and the space before."""
        ends = (*self._control.all, *self._template.ends)
        while end := next((token for token in ends if text.endswith(token)), ""):
            text = text.removesuffix(end).rstrip()
        return text

    def _refuse_ignored(self, text: str, messages: list[Message], tools: list | None, options: dict) -> None:
        """Raises DataError where the text would be the same without the tools, or with other calls or words."""
        refuse_unwritten_tools(tools or [], text)
        if tools and self._template.writes_the_same(text, messages, None, options):
            raise not_written("tools", "none of them", "tools")
        if self._template.documents(options) and self._template.writes_the_same(
            text, messages, tools, options | {"documents": None}
        ):
            raise not_written("documents", "none of them", "chat_template_kwargs")
        for number, message in enumerate(messages):
            for what, other in others(message):
                changed = [*messages[:number], other, *messages[number + 1 :]]
                if what != THOUGHTS and self._template.writes_the_same(text, changed, tools, options):
                    raise not_written(what, "none of them", "prompt")

    def _until_end(self, response: Message, field: str, remarks: set[str]) -> Message:
        """The response, its text cut before an end of turn."""
        said = response.get("content") or ""
        content = until_first(self._template.ends, said)
        if content != said:
            end = next(token for token in self._template.ends if said.startswith(token, len(content)))
            if not content.strip() and not response.get("tool_calls"):
                raise DataError("an answer before its end of turn", f"{end!r} at once", "Drop the row.", field=field)
            remarks.add(CUT_AT_END.format(end))
            response = response | {"content": content}
        remarks |= self._control_remarks(CONTROL_IN_ANSWER, [response])
        return response

    def _control_remarks(self, words: str, messages: list[Message]) -> set[str]:
        texts = (text for message in messages for text in message.values() if isinstance(text, str))
        return {words.format(token) for text in texts for token in self._control.within(text)}

    def _until_end_of_turn(self, text: str) -> str:
        shorter = text.rstrip()
        return shorter if shorter.endswith(self._control.all) else text


def log_remarks(remarks: Counter[str], what: str) -> None:
    """One warning for each remark, with the number of what it was made of."""
    for remark, count in remarks.most_common():
        logger.warning("%d %s%s: %s", count, what, "s"[: count > 1], remark)


def _after(start: str, text: str, field: str) -> str:
    """What a conversation adds to its prompt.

    Raises:
        DataError: it does not begin with its prompt, or adds nothing.
    """
    if not text.startswith(start):
        raise DataError(
            f"a chat template whose conversation starts with its prompt, {shown(start[-40:])}",
            shown(text[len(start) - 40 :]),
            "Choose the template's other mode with chat_template_kwargs (e.g. enable_thinking: false), or set "
            "a chat_template without it.",
            field=field,
        )
    if not text[len(start) :].strip():
        raise DataError("a response", "nothing after the chat template", "Drop the row.", field=field)
    return text[len(start) :]
