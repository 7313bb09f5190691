"""A tokenizer's chat template, given messages in the form that it can write.

Templates that want content as a list of parts, as those of vision-language models, get it so, from all roles, from the
assistant alone, or from the others: a string has no parts, and its words would vanish. Those that cannot write the
arguments of calls as they are get them as mappings or as JSON text.
"""

from __future__ import annotations

import re
from inspect import signature
from typing import TYPE_CHECKING

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Message

from .call_arguments import forms_of_calls, quotes_arguments
from .control_tokens import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED, _ANSWERED = "wrpo '0f' \"3a\"", "wrpo '7c' \"1e\""  # in no template, nor so in a list that is printed
# Settled here, and by the tokenizer, whose releases add others: none of them a variable of a template.
OWN_OPTIONS = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation max_length messages padding "
    "return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools truncation".split()
)
OF_TEMPLATES = {"documents", "kwargs"}  # arguments of `apply_chat_template` that are handed on
# Whether messages of the assistant, and of all others, get their content in parts; tried in this order.
FORMS = ((False, False), (True, True), (True, False), (False, True))
_MARK = re.compile(r"^\s*(<[^<>\s]+>)")  # of an end of turn that is no special token


class ChatTemplate:
    """What the template makes of messages.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        options: passed on to the template, e.g. {"enable_thinking": False}.

    Attributes:
        control: the tokenizer's special tokens.
        ends: what ends an answer: the token, or mark, that the template writes, and the tokenizer's own.
        writes_prompts: whether it writes anything but the answer.

    Raises:
        DataError: a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict | None = None):
        self._tokenizer, self._options = tokenizer, options or {}
        self._own_options = OWN_OPTIONS | (signature(tokenizer.apply_chat_template).parameters.keys() - OF_TEMPLATES)
        self._check_options(self._options)
        self.control = ControlTokens(tokenizer)
        if not tokenizer.chat_template:
            raise DataError(
                "a tokenizer with a chat template",
                "one without",
                "Take that of the chat version of the model, or set tokenizer.chat_template: to a template, or to "
                "wrpo.pretrained.plain_template(tokenizer) for prompt and answer as they are.",
            )
        tried_in = {form: self._tried(form) for form in FORMS}
        whole = [form for form, text in tried_in.items() if _ASKED in text and _ANSWERED in text]
        self._form = next(iter([*whole, *(form for form, text in tried_in.items() if _ANSWERED in text), *FORMS]))
        tried = tried_in[self._form]
        self.writes_prompts = _ASKED in tried or not tried
        after = tried.partition(_ANSWERED)[2]
        end = self.control.first(after) or next(iter(_MARK.findall(after)), None)
        eos = tokenizer.eos_token if tokenizer.eos_token in self.control.all else None
        self.ends = tuple(dict.fromkeys(token for token in (end, eos) if token))

    def text(self, field: str, messages: list[Message], tools: list | None, options: dict) -> str:
        """The messages' text, with the opening of an answer behind all but an assistant's.

        Raises:
            DataError: the template refuses the messages; `field` is theirs.
        """
        self._check_options(options)
        of_assistant, of_others = self._form
        messages = [
            _in_parts(message) if (of_assistant if message["role"] == "assistant" else of_others) else message
            for message in messages
        ]
        how = {
            "tokenize": False,
            "add_generation_prompt": messages[-1]["role"] != "assistant",
            "tools": tools,
            **self._options,
            **options,
        }
        refusal: Exception | None = None
        for form in forms_of_calls(messages):
            try:
                text = self._tokenizer.apply_chat_template(form, **how)
            except Exception as error:  # a template raises what it likes: its own refusals, and Python's errors in it
                refusal = refusal or error
            else:
                if not quotes_arguments(form, text):
                    return text
        todo = "Rewrite the messages as this chat template wants them."
        got = f"its refusal: {refusal or 'arguments of calls are text within text'}"
        raise DataError("messages the chat template accepts", got, todo, field=field) from refusal

    def documents(self, options: dict) -> list[dict]:
        """Those that the run or the row gives the template to answer from."""
        return {**self._options, **options}.get("documents") or []

    def _check_options(self, options: dict) -> None:
        """Raises DataError for options that settle what is settled here, whose text would be none, or another's, and
        for documents that are no objects.
        """
        if found := sorted(self._own_options & options.keys()):
            raise DataError(
                "variables of the chat template",
                ", ".join(found),
                "Leave them out; tools are a field of the row, beside its messages.",
                field="chat_template_kwargs",
            )
        documents = options.get("documents") or []
        if not (isinstance(documents, list) and all(isinstance(one, dict) and one for one in documents)):
            todo = "Write each document as an object, with a title and a text."
            raise DataError("a list of objects", shown(documents), todo, field="chat_template_kwargs.documents")

    def writes_the_same(self, text: str, messages: list[Message], tools: list | None, options: dict) -> bool:
        """Whether other messages or tools give the same text, so that it does not tell them apart."""
        try:
            return self.text("prompt", messages, tools, options) == text
        except DataError:
            return False

    def _tried(self, form: tuple[bool, bool]) -> str:
        """A short conversation as text; nothing where the template refuses it."""
        self._form = form
        messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
        try:
            return self.text("prompt", messages, None, {})
        except DataError:
            return ""


def _in_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message.get("content") or ""}]}
