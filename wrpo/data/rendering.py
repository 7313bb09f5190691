"""A prompt and its responses as the text that the model reads, by the tokenizer's chat template.

    prompt    rendered with the generation prompt: generation starts exactly where it ends
    response  what the rendering of the whole conversation adds after that, up to and including the end-of-turn token

Messages, tools and options reach the template as they are. Whitespace that a template writes after the end-of-turn
token is left out: no model ever generates it, and a log-probability summed over a response should not count it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wrpo.rows.errors import DataError, shown
from wrpo.rows.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        self.special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        if not tokenizer.chat_template:
            raise DataError(
                "a tokenizer with a chat template",
                "one without",
                "Take the tokenizer of a chat model, name a template with chat_template_file, or write chat_template: "
                "none to train on the prompt, the answer and the end-of-sequence token alone.",
            )

    def __call__(
        self,
        prompt: list[Message],
        responses: dict[str, Message],
        *,
        tools: list | None = None,
        chat_template_kwargs: dict | None = None,
    ) -> tuple[str, dict[str, str]]:
        """(prompt text, {field: prompt and response text}); each of the second starts with the first.

        Args:
            prompt: messages, the last one not the assistant's.
            responses: an assistant's message for each field.
            tools: what the model may call.
            chat_template_kwargs: the row's own options; they win over those of the run.

        Raises:
            DataError: the template refuses the prompt, writes a conversation that does not start with its prompt, or
                leaves out tools or calls of them.
        """
        options = self.template_kwargs | (chat_template_kwargs or {})
        start = self._render("prompt", prompt, tools, options)
        _refuse_left_out(tools or [], start, "tools")
        whole = {}
        for field, message in responses.items():
            text = self._until_end_of_turn(self._render(field, [*prompt, message], tools, options))
            _refuse_another_start(text, start, field)
            _refuse_left_out(message.get("tool_calls") or [], text[len(start) :], field)
            whole[field] = text
        return start, whole

    def ends_its_turns(self, text: str) -> bool:
        """Whether a rendered conversation ends with a special token, at which generation can stop."""
        return text.endswith(self.special)

    def without_end(self, text: str) -> str:
        """A rendered conversation without what ends its last turn: special tokens, and the space before them."""
        while end := next((token for token in self.special if text.endswith(token)), ""):
            text = text.removesuffix(end).rstrip()
        return text

    def _render(self, field: str, messages: list[Message], tools: list | None, options: dict) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=messages[-1]["role"] != "assistant",
                tools=tools,
                **options,
            )
        except Exception as error:  # a template raises what it likes: its own refusals, and Python's errors in it
            todo = "Rewrite the messages as this chat template wants them."
            got = f"its refusal: {error}"
            raise DataError("messages the chat template accepts", got, todo, field=field) from error

    def _until_end_of_turn(self, text: str) -> str:
        shorter = text.rstrip()
        return shorter if shorter.endswith(self.special) else text


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


def _refuse_left_out(functions: list, text: str, field: str) -> None:
    """Many templates know no tools, and leave them and their calls out without a word."""
    for function in functions:
        name = _name(function)
        if name is not None and name not in text:
            todo = "Take a chat template that writes tools, or leave them out of the data."
            raise DataError(f"a chat template that writes the tool {name!r}", "none of it", todo, field=field)


def _name(function: Any) -> str | None:
    """Of {"function": {"name": ..}}, and of the same without its envelope."""
    inner = function.get("function", function) if isinstance(function, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None
