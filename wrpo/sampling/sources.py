"""Which models answer, from a YAML file: a list, one entry a model.

    - model: big-model                       # its name in the rows
      kind: server                           # any OpenAI-compatible server
      base_url: http://localhost:8000/v1
      api_key_env: BIG_MODEL_KEY             # name of the environment variable that holds the key, never the key
      concurrency: 32
      requests_per_minute: 600
    - model: target
      kind: transformers                     # run in this process
      path: runs/sft
    - model: other
      kind: vllm
      path: org/other-model
      engine: {tensor_parallel_size: 4}

`samples`, `temperature`, `top_p` and `max_tokens` of an entry win over the command's. A key never stands in the file:
what it holds is written into no row, log or message either, also where a server's answer repeats it. What has fewer
than 8 characters is taken for a placeholder (`EMPTY`), and answers may hold it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from wrpo.rows.errors import shown
from wrpo.settings import REQUIRED, SettingsError, check_choices, check_range, knob, settings_from
from wrpo.settings.model import check_template
from wrpo.settings.yaml_file import read_yaml

from .settings import Sampling

SET_ELSEWHERE = ("model", "messages", "stream", "n")  # fields of a request that no setting may touch


@dataclass
class Source:
    """One model that answers."""

    model: str = knob(REQUIRED, "Name of the model in the rows; the target's own answers carry `target`.")
    samples: int | None = knob(None, "Answers a prompt. Default: the command's.")
    temperature: float | None = knob(None, "Softmax temperature; 0 is greedy. Default: the command's.")
    top_p: float | None = knob(None, "Nucleus sampling. Default: the command's.")
    max_tokens: int | None = knob(None, "Longest answer, in tokens of the model. Default: the command's.")

    def __post_init__(self) -> None:
        if not self.model.strip() or not self.model.isprintable():
            raise ValueError(f"model: expected a name, got {self.model!r}.")
        self.sampling(Sampling())  # refuses what is out of range

    def check_ready(self) -> None:
        """Raises ValueError where it cannot be asked from here: no key in the environment, no package."""

    def sampling(self, default: Sampling) -> Sampling:
        own = {name: getattr(self, name) for name in ("samples", "temperature", "top_p", "max_tokens")}
        return replace(default, **{name: value for name, value in own.items() if value is not None})


@dataclass
class ServerSource(Source):
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, TGI, `transformers serve`, or a vendor's."""

    base_url: str = knob("", "Address of the server's API, for example http://localhost:8000/v1.")
    served_model: str | None = knob(None, "Name of the model on the server. Default: `model`.")
    api_key_env: str | None = knob(None, "Name of the environment variable that holds the key. Default: no key.")
    concurrency: int = knob(8, "Requests in flight at a time.")
    requests_per_minute: float | None = knob(None, "Most requests started in a minute, evenly spaced. Default: any.")
    timeout: float = knob(600.0, "Seconds that one answer may take.")
    retries: int = knob(6, "Further tries after one that failed (time-out, lost connection, 408, 409, 429, 5xx, ...).")
    retry_wait: float = knob(
        1.0, "Seconds before the first further try; doubled each time, less up to half of it by chance."
    )
    longest_retry_wait: float = knob(60.0, "Seconds at which that doubling ends.")
    give_up_after: int = knob(
        20, "Requests in a row that the server left unanswered, after all tries, that end asking this model."
    )
    extra_body: str | None = knob(
        None, "Further fields of each request, a mapping, e.g. {chat_template_kwargs: {enable_thinking: false}}."
    )
    leave_out: list[Literal["temperature", "top_p", "max_tokens", "seed"]] | None = knob(
        None, "Fields of a request that the server refuses."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        _check_address(self.base_url)
        check_range(self, "concurrency", "give_up_after", low=1)
        check_range(self, "timeout", "retries", "retry_wait", "longest_retry_wait", low=0)
        check_range(self, "requests_per_minute", low=0, open_low=True)
        _check_mapping("extra_body", self.extra_body, SET_ELSEWHERE)

    def check_ready(self) -> None:
        if find_spec("openai") is None:
            raise ValueError("needs the package openai: pip install 'wrpo[sample]'")
        self.key()

    def key(self) -> str | None:
        """The key, from the environment, each time it is needed.

        Raises:
            ValueError: the variable is not set, or holds no key.
        """
        if self.api_key_env is None:
            return None
        value = os.environ.get(self.api_key_env, "").strip()
        if not value:
            # Somebody may have put the key itself here, so only what looks like a variable's name is repeated.
            is_name = re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env)
            named = self.api_key_env if is_name else "the variable that it names"
            raise ValueError(f"api_key_env: {named} is not set. It must hold the key of {self.model!r}'s server.")
        if not value.isascii() or not value.isprintable():
            raise ValueError("api_key_env: the variable holds characters that no key has.")
        return value

    def body(self) -> dict[str, Any]:
        return json.loads(self.extra_body) if self.extra_body else {}


@dataclass
class LocalSource(Source):
    """A model that transformers runs in this process, on the GPU if there is one."""

    path: str | None = knob(None, "Folder or hub name of the model and its tokenizer. Default: `model`.")
    gguf_file: str | None = knob(None, "GGUF file in that folder to take weights and tokenizer from.")
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob("auto", "Type of the weights in memory.")
    attn_implementation: str | None = knob(None, "Attention of transformers: eager, sdpa, flash_attention_2.")
    chat_template: str | None = knob(None, "none: prompts as they are, without a chat template.")
    chat_template_file: str | None = knob(None, "Jinja file used instead of the tokenizer's chat template.")
    trust_remote_code: bool = knob(False, "Run code that a hub repository carries.")
    batch_size: int = knob(16, "Answers generated at a time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check_range(self, "batch_size", low=1)
        check_template(self)


@dataclass
class VllmSource(Source):
    """A model that vLLM runs in this process."""

    path: str | None = knob(None, "Folder or hub name of the model. Default: `model`.")
    batch_size: int = knob(256, "Requests handed to vLLM at a time; their answers are written when all are there.")
    engine: str | None = knob(None, "Arguments of vllm.LLM, a mapping, e.g. {tensor_parallel_size: 4}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "batch_size", low=1)
        _check_mapping("engine", self.engine, ("model",))

    def engine_arguments(self) -> dict[str, Any]:
        return json.loads(self.engine) if self.engine else {}


KINDS: dict[str, type[Source]] = {"server": ServerSource, "transformers": LocalSource, "vllm": VllmSource}


def _check_address(url: str) -> None:
    """Refuses what is no plain address; the words do not repeat it, for it may hold a key."""
    try:
        address = urlsplit(url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        (address.hostname or "").encode("idna")  # refuses `a..b`, and labels of more than 63 letters
    except ValueError:
        is_address = False
    if not is_address or not url.isprintable() or any(character.isspace() for character in url):
        raise ValueError("base_url: expected an address such as http://localhost:8000/v1, with a port from 1 to 65535")
    if address.username is not None or address.password is not None:
        raise ValueError("base_url: must hold no user name and no password; api_key_env names where a key is.")
    for mark in "?#":
        if mark in url:
            raise ValueError(f"base_url: must hold no '{mark}...'; api_key_env names where a key is.")


def read_sources(path: str | Path, models: Collection[str] = ()) -> list[Source]:
    """The models of a sources file, in its order; only those named `models`, if any are.

    Raises:
        SettingsError: not such a list, an unknown or misspelt field, a value out of range, two entries of one name; no
            entry of a name in `models`; of a model that is asked, a key that is not in the environment, or a package
            that is not installed.
        FileNotFoundError: no such file.
    """
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        got = type(entries).__name__ if entries is not None else "an empty file"
        raise SettingsError(f"{path}: expected a list of models ('- model: ...'), got {got}")
    sources = [_source(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, start=1)]
    names = [source.model for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"{path}: two models are named {name!r}; answers are told apart by that name")
    for name in models:
        if name not in names:
            raise SettingsError(f"model: expected one of {', '.join(names)} in {path}, got {name!r}")
    for number, source in enumerate(sources, start=1):
        if not models or source.model in models:
            check_ready(source, f"{path}: entry {number}")
    return [source for source in sources if not models or source.model in models]


def check_ready(source: Source, place: str) -> None:
    """Raises SettingsError, which names the place in the settings, where the source cannot be asked from here."""
    try:
        source.check_ready()
    except ValueError as error:
        raise SettingsError(f"{place}: {error}") from None


def _source(entry: Any, place: str) -> Source:
    if not isinstance(entry, dict):
        raise SettingsError(f"{place}: expected 'field: value' lines, got {type(entry).__name__}")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        got = shown(kind) if "kind" in entry else "none"
        raise SettingsError(f"{place}: kind: expected one of {', '.join(KINDS)}, got {got}")
    source = source_from(KINDS[kind], {k: v for k, v in entry.items() if k != "kind"}, place)
    assert isinstance(source, Source)
    return source


def source_from(cls: type, entry: dict, place: str) -> Any:
    """`settings_from` for what may hold a key by mistake: a value that is no number is not repeated."""
    refuse_key(entry, place)
    return settings_from(cls, entry, place, hides_values=True)


def refuse_key(entry: dict, place: str) -> None:
    """Raises SettingsError where the entry holds a key, or what may be one."""
    for name in entry:
        plain = str(name).lower().replace("-", "_")
        if plain in ("api_key", "key", "token", "api_token", "password", "headers"):
            todo = "Keys come from the environment: api_key_env: NAME_OF_THE_VARIABLE"
            raise SettingsError(f"{place}: {name}: no key may stand in this file. {todo}")


def _check_mapping(name: str, text: str | None, taken: tuple[str, ...]) -> None:
    """Refuses text that is no JSON object, or that names what other settings decide."""
    if text is None:
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, such as {{a: 1}}.")
    for key in taken:
        if key in value:
            raise ValueError(f"{name}: {key!r} is set elsewhere; leave it out.")
