"""The tokenizer that the settings name, and its chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wrpo.settings import ModelSettings, SettingsError

from .adapter import find_adapter
from .checkpoint import from_pretrained

# `chat_template: none`: prompt, answer, end of sequence; as a template it is saved with the model, and everything that
# asks the model goes by it. The tokenizer's own beginning of sequence stands in front where it would put one.
PLAIN = (
    "{% for message in messages %}{% if loop.index > 2 or (message.role == 'assistant') != (loop.index == 2) %}"
    "{{ raise_exception('chat_template none takes one message and its answer') }}{% endif %}"
    "{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN_WITH_START = "{% if not messages[0].content.startswith(bos_token) %}{{ bos_token }}{% endif %}" + PLAIN


def load_tokenizer(settings: ModelSettings, field: str = "model_name_or_path") -> PreTrainedTokenizerBase:
    """The tokenizer with a padding token and, where the settings name one, another chat template.

    field: the setting that the user gave the name in, for the message.

    Raises:
        SettingsError: nothing to load there, a template file that is no text, or `chat_template: none` for a tokenizer
            without an end-of-sequence token.  FileNotFoundError: no such template file.
    """
    if settings.gguf_file is not None and find_adapter(settings, field):
        settings = replace(settings, gguf_file=None)  # it lies with the adapter's model
    tokenizer = from_pretrained(AutoTokenizer, settings, field)
    if settings.chat_template_file:
        tokenizer.chat_template = _template(Path(settings.chat_template_file))
    if settings.chat_template == "none":
        tokenizer.chat_template = plain_template(tokenizer, f"{field} {settings.model_name_or_path!r}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any id serves
    return tokenizer


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise SettingsError(f"chat_template_file: expected a Jinja file in UTF-8, got {path}: {error}") from error


def plain_template(tokenizer: Any, place: str = "tokenizer") -> str:
    """The chat template that writes prompt, answer and end of sequence, and nothing else.

    Raises:
        SettingsError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token is None:
        raise SettingsError(
            f"{place}: chat_template none needs an eos_token to end an answer, and the tokenizer has none"
        )
    starts = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return PLAIN_WITH_START if starts else PLAIN


def require_template(tokenizer: Any, place: str, *, may_be_none: bool) -> None:
    """Raises SettingsError for a tokenizer without a chat template: nobody could ask the model as it was trained.

    Args:
        place: the setting that names the model, and its value, for the message.
        may_be_none: whether a setting chat_template, which may be none, stands beside chat_template_file.
    """
    if not tokenizer.chat_template:
        ways = "Take the chat version of the model, or name a template with chat_template_file"
        plain = ", or set chat_template to none: prompt and answer as they are" if may_be_none else ""
        raise SettingsError(f"{place}: expected a tokenizer with a chat template, got one without. {ways}{plain}")
