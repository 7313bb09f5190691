"""A prompt and its responses as the text that the model reads, by the tokenizer's chat template.

    prompt    rendered with the generation prompt: generation starts exactly where it ends
    response  what the rendering of the whole conversation adds after that, up to and including the end-of-turn token

Whitespace that a template writes after the end-of-turn token is left out: no model ever generates it, and a
log-probability summed over a response should not count it. Without a chat template the text is prompt, response and the
end-of-sequence token, with the beginning-of-sequence token in front where the tokenizer itself would put it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

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
        DataError: a tokenizer with neither a chat template nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        self.special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        if not tokenizer.chat_template and tokenizer.eos_token is None:
            raise DataError(
                "a tokenizer with a chat template or an eos_token", "neither", "Set tokenizer.chat_template."
            )

    def __call__(self, prompt: list[Message], responses: dict[str, str]) -> tuple[str, dict[str, str]]:
        """(prompt text, {field: prompt and response text}); each of the second starts with the first.

        Raises:
            DataError: the template refuses the prompt, or writes a conversation that does not start with its prompt.
        """
        render = self._template if self.tokenizer.chat_template else self._plain
        start = render(prompt, None)
        whole = {field: self._until_end_of_turn(render(prompt, text)) for field, text in responses.items()}
        for field, text in whole.items():
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
        return start, whole

    def ends_its_turns(self, text: str) -> bool:
        """Whether a rendered conversation ends with a special token, at which generation can stop."""
        return text.endswith(self.special)

    def _template(self, prompt: list[Message], response: str | None) -> str:
        answer = [] if response is None else [{"role": "assistant", "content": response}]
        try:
            return self.tokenizer.apply_chat_template(
                prompt + answer, tokenize=False, add_generation_prompt=response is None, **self.template_kwargs
            )
        except TemplateError as error:
            todo = "Rewrite the messages as this chat template wants them."
            raise DataError(
                "messages the chat template accepts", f"its refusal: {error}", todo, field="prompt"
            ) from error

    def _plain(self, prompt: list[Message], response: str | None) -> str:
        if len(prompt) != 1:
            todo = "Set tokenizer.chat_template to train on conversations."
            got = f"{len(prompt)} messages and a tokenizer without chat template"
            raise DataError("one message", got, todo, field="prompt")
        text = prompt[0]["content"]
        bos = self.tokenizer.bos_token
        if bos and not text.startswith(bos) and self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id:
            text = bos + text
        return text if response is None else text + response + self.tokenizer.eos_token

    def _until_end_of_turn(self, text: str) -> str:
        shorter = text.rstrip()
        return shorter if shorter.endswith(self.special) else text
