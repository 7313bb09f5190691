"""A prompt and its responses as the text that the model reads, by the tokenizer's chat template.

    prompt    rendered with the generation prompt: generation starts exactly where it ends
    response  what the rendering of the whole conversation adds after that, up to and including the end-of-turn token

Messages, tools and options reach the template as they are, and what it leaves out of them is refused or remarked
(`wrpo.data.left_out`). Four things are changed on the way. Templates that want content as a list of parts, as those of
vision-language models, get it so; those that cannot write the arguments of calls as they are get them as mappings or as
JSON text. An answer that carries an end of turn in its text, as servers may leave it there, is
cut before the first. And whitespace that a template writes after the end-of-turn token is left out: no model ever
generates it, and a log-probability summed over a response should not count it.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Message

from .call_arguments import forms_of_calls, quotes_arguments
from .control_tokens import ControlTokens, until_first
from .left_out import Rendered, refuse_unwritten_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wrpo.data")

CUT_AT_END = "answer cut before the end of turn {!r} in its text"
CONTROL_IN_ANSWER = "control token {!r} in the text of an answer"
CONTROL_IN_PROMPT = "control token {!r} in the text of a prompt: the model reads it as one, not as words"

_OPENING = 64  # last characters of a prompt, among which its template may have opened the answer
_ASKED, _ANSWERED = "wrpo '0f' \"3a\"", "wrpo '7c' \"1e\""  # in no template, nor so in a list that is printed


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
        self.template_kwargs = template_kwargs or {}
        self.control = ControlTokens(tokenizer)
        if not tokenizer.chat_template:
            raise DataError(
                "a tokenizer with a chat template",
                "one without",
                "Take the tokenizer of a chat model, name a template with chat_template_file, or write chat_template: "
                "none to train on the prompt, the answer and the end-of-sequence token alone.",
            )
        as_text, as_parts = self._tried(wants_parts=False), self._tried(wants_parts=True)
        self._wants_parts = _ANSWERED not in as_text and _ANSWERED in as_parts
        tried = as_parts if self._wants_parts else as_text
        self._writes_prompts = _ASKED in tried or not tried
        ends = (tokenizer.eos_token, self.control.first(tried.partition(_ANSWERED)[2]))
        self._ends = tuple(token for token in self.control.all if token in ends)

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
        start = self._render("prompt", prompt, tools, options)
        Rendered(start, remarks).find_prompt(prompt)
        refuse_unwritten_tools(tools or [], start)
        opening = start[-_OPENING:]
        whole = {}
        for field, response in responses.items():
            message = self._until_end(response, field, remarks)
            text = self._until_end_of_turn(self._render(field, [*prompt, message], tools, options))
            _refuse_another_start(text, start, field)
            Rendered(opening + text[len(start) :], remarks).find_answer(message, field, opening)
            whole[field] = text
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
        text = self._render("prompt", [*prompt, answer], tools, chat_template_kwargs or {})
        rendered = Rendered(text, remarks)
        if self._writes_prompts:
            rendered.find_prompt(prompt)
            refuse_unwritten_tools(tools or [], text)
        rendered.find_answer(answer, "response")
        return text, remarks

    def ends_its_turns(self, text: str) -> bool:
        """Whether a rendered conversation ends with a special token, at which generation can stop."""
        return text.endswith(self.control.all)

    def _tried(self, wants_parts: bool) -> str:
        """A short conversation, rendered; nothing where the template refuses it."""
        self._wants_parts = wants_parts
        messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
        try:
            return self._render("prompt", messages, None, {})
        except DataError:
            return ""

    def _render(self, field: str, messages: list[Message], tools: list | None, options: dict) -> str:
        """The messages' text, the arguments of calls in the first form that the template can write."""
        if self._wants_parts:
            messages = [_in_parts(message) for message in messages]
        how = {
            "tokenize": False,
            "add_generation_prompt": messages[-1]["role"] != "assistant",
            "tools": tools,
            **self.template_kwargs,
            **options,
        }
        refusal: Exception | None = None
        for form in forms_of_calls(messages):
            try:
                text = self.tokenizer.apply_chat_template(form, **how)
            except Exception as error:  # a template raises what it likes: its own refusals, and Python's errors in it
                refusal = refusal or error
            else:
                if not quotes_arguments(form, text):
                    return text
        todo = "Rewrite the messages as this chat template wants them."
        got = f"its refusal: {refusal or 'arguments of calls are text within text'}"
        raise DataError("messages the chat template accepts", got, todo, field=field) from refusal

    def _until_end(self, response: Message, field: str, remarks: set[str]) -> Message:
        """The response, its text cut before an end of turn."""
        said = response.get("content") or ""
        content = until_first(self._ends, said)
        if content != said:
            end = next(token for token in self._ends if said.startswith(token, len(content)))
            if not content.strip() and not response.get("tool_calls"):
                raise DataError("an answer before its end of turn", f"{end!r} at once", "Drop the row.", field=field)
            remarks.add(CUT_AT_END.format(end))
            response = response | {"content": content}
        remarks |= self._control_remarks(CONTROL_IN_ANSWER, [response])
        return response

    def _control_remarks(self, words: str, messages: list[Message]) -> set[str]:
        texts = (text for message in messages for text in message.values() if isinstance(text, str))
        return {words.format(token) for text in texts for token in self.control.within(text)}

    def _until_end_of_turn(self, text: str) -> str:
        shorter = text.rstrip()
        return shorter if shorter.endswith(self.control.all) else text


def log_remarks(remarks: Counter[str], what: str) -> None:
    """One warning for each remark, with the number of what it was made of."""
    for remark, count in remarks.most_common():
        logger.warning("%d %s%s: %s", count, what, "s"[: count > 1], remark)


def _in_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message.get("content") or ""}]}


def _refuse_another_start(text: str, start: str, field: str) -> None:
    if not text.startswith(start):
        raise DataError(
            f"a chat template whose conversation starts with its prompt, {shown(start[-40:])}",
            shown(text[len(start) - 40 :]),
            "Choose the template's other mode with chat_template_kwargs (e.g. enable_thinking: false), or set "
            "a chat_template without it.",
            field=field,
        )
    if len(text) == len(start):
        raise DataError("a response", "nothing after the chat template", "Drop the row.", field=field)
