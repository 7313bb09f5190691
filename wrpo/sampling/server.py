"""One model behind an OpenAI-compatible server, asked with time-outs, retries and a rate limit.

What fails is tried again when trying again can help: time-outs, lost connections, 408, 409, 429 and 5xx, and replies
that cannot be used. An error inside a reply of status 200 has the status that it names. Wait number k is drawn from
[1/2, 1] * min(longest_retry_wait, retry_wait * 2^k), or is what the server's Retry-After asks for, up to five minutes.
Other 4xx cost their request; 401, 402, 403 and 404 mean the settings or the account, and end asking this model. So do
`give_up_after` requests in a row that the server left unanswered; a request that it refuses or answers badly says
nothing about the next one, and is met again first when a run is continued.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import openai

from wrpo.rows.messages import Message

from .prompts import Reply
from .refusal import Refusal, words_of
from .served_messages import served_messages
from .sources import ServerSource

T = TypeVar("T")
Fault = Literal["server", "request", "reply"]

LONGEST_RETRY_AFTER = 300.0  # s
LONGEST_REASON = 200  # characters of a server's message that are repeated
SHORTEST_KEY = 8  # characters; servers that want none are sent a placeholder
ENDS_ASKING = (401, 402, 403, 404)
TEMPORARY = (408, 409, 429)


class UnusableReply(Exception):
    """A reply that another try, with another seed, may replace by a better one."""


class Failed(Exception):
    """A request that got no answer, after all its tries; the words hold no key.

    Attributes:
        fault: whose it is: the "server" left it unanswered, the "request" was refused, the "reply" could not be used.
    """

    def __init__(self, words: str, fault: Fault):
        super().__init__(words)
        self.fault = fault


class Server:
    """A server's model; `on_retry` is called before each further try.

        async with Server(source) as server:
            text = await server.ask(messages, options, read)

    Attributes:
        given_up: why nothing more is asked, or None.
    """

    def __init__(self, source: ServerSource, on_retry: Callable[[], None] = lambda: None):
        self.source, self._on_retry = source, on_retry
        self.given_up: str | None = None
        self._unanswered_in_a_row = 0
        self._key = source.key()
        # A key is sent where the settings say so, and nowhere else: without one the client would take OPENAI_API_KEY.
        self._client = openai.AsyncOpenAI(
            base_url=source.base_url, api_key=self._key or "none", max_retries=0, timeout=source.timeout
        )
        self._client.organization = self._client.project = self._client.admin_api_key = None  # nor its other variables
        self._pace = Pace(source.requests_per_minute)

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: list[Message],
        options: Callable[[int], dict[str, Any]],
        read: Callable[[Reply], T],
        beside: dict[str, Any] | None = None,
    ) -> T:
        """What `read` makes of the reply.

        Args:
            messages: the conversation so far.
            options: number of unusable replies so far -> temperature, top_p, max_tokens, seed.
            read: of a reply that is not empty; raises `UnusableReply`.
            beside: what the server's chat template reads beside the messages: tools, chat_template_kwargs.

        Raises:
            Failed: no usable reply.
        """
        try:
            result = await self._ask_with_retries(served_messages(messages), options, read, self._body(beside or {}))
        except Failed as failure:
            self._unanswered_in_a_row = self._unanswered_in_a_row + 1 if failure.fault == "server" else 0
            if self._unanswered_in_a_row >= self.source.give_up_after:
                self.given_up = self.given_up or f"{self._unanswered_in_a_row} requests failed in a row"
            raise failure from None
        self._unanswered_in_a_row = 0
        return result

    def _body(self, beside: dict[str, Any]) -> dict[str, Any]:
        """The source's further fields of a request, and those of the prompt, which win."""
        body = self.source.body()
        if "chat_template_kwargs" in beside:
            of_source = body.get("chat_template_kwargs")
            options = of_source if isinstance(of_source, dict) else {}
            beside = beside | {"chat_template_kwargs": options | beside["chat_template_kwargs"]}
        return body | beside

    async def _ask_with_retries(
        self, messages: list[Message], options: Callable, read: Callable[[Reply], T], body: dict[str, Any]
    ) -> T:
        unusable = 0
        fault: Fault
        for attempt in range(self.source.retries + 1):
            wait, fault = None, "server"
            try:
                await self._pace.turn()
                return read(await self._request(messages, options(unusable), body))
            except UnusableReply as error:
                reason, fault = self._masked(str(error))[:LONGEST_REASON], "reply"
                unusable += 1
            except (asyncio.TimeoutError, openai.APITimeoutError):
                reason = f"no answer within {self.source.timeout:g} s"
            except Refusal as refusal:
                reason = self._masked_message(str(refusal), f"{refusal.status or 'an error inside the reply'}: ")
                self._raise_if_permanent(refusal, reason)
                wait = refusal.retry_after
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                words = str(getattr(cause, "message", "")) or str(cause) or type(cause).__name__
                reason = self._masked_message(words, f"no connection to {self.source.base_url}: ")
            if attempt < self.source.retries and self.given_up is None:
                self._on_retry()
                await asyncio.sleep(self._seconds_to_wait(attempt) if wait is None else wait)
            else:
                break
        tries = attempt + 1
        raise Failed(f"{reason} ({tries} {'tries' if tries > 1 else 'try'})", fault)

    async def _request(self, messages: list[Message], options: dict[str, Any], body: dict[str, Any]) -> Reply:
        left_out = self.source.leave_out or ()
        try:
            completion = await asyncio.wait_for(  # of the whole answer; the client's own is between two bytes of it
                self._client.chat.completions.create(
                    model=self.source.served_model or self.source.model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_body=body or None,
                    **{name: value for name, value in options.items() if name not in left_out},
                ),
                self.source.timeout,
            )
        except openai.APIStatusError as error:
            raise Refusal(error.body or str(error), error.status_code, _retry_after(error)) from None
        except (ValueError, RecursionError, openai.APIResponseValidationError) as error:
            # No JSON, brackets in thousands of brackets, or a number of thousands of digits.
            raise _no_completion(getattr(error, "doc", None)) from None
        reply = _reply(completion)
        return Reply(self._masked(reply.text), reply.finish_reason and self._masked(reply.finish_reason))

    def _raise_if_permanent(self, refusal: Refusal, reason: str) -> None:
        """Raises where trying again cannot help."""
        if refusal.is_final or refusal.status in ENDS_ASKING:
            self.given_up = self.given_up or reason
            raise Failed(reason, "request") from None
        if refusal.status is not None and refusal.status < 500 and refusal.status not in TEMPORARY:
            raise Failed(reason, "request") from None

    def _seconds_to_wait(self, attempt: int) -> float:
        longest = min(self.source.longest_retry_wait, self.source.retry_wait * 2.0 ** min(attempt, 60))
        return longest * random.uniform(0.5, 1.0)

    def _masked_message(self, words: str, prefix: str) -> str:
        """One line of the server's words; some servers repeat the key that they were sent."""
        words = " ".join(words.split())
        if self._key:
            words = words.replace(self._key, "***")
        return prefix + self._masked(words)[:LONGEST_REASON]

    def _masked(self, text: str) -> str:
        """The text without the key, percent-encoded or not; a placeholder such as `EMPTY` is a word like any other."""
        if self._key is None or len(self._key) < SHORTEST_KEY:
            return text
        forms = {self._key, quote(self._key), quote(self._key, safe="")}
        return re.sub("|".join(map(re.escape, forms)), "***", text, flags=re.IGNORECASE)


class Pace:
    """Lets so many through a minute, evenly spaced: a minute's worth at once is what servers refuse."""

    def __init__(
        self,
        per_minute: float | None,
        now: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._now = now or (lambda: asyncio.get_running_loop().time())
        self._sleep = sleep
        self._next = 0.0

    async def turn(self) -> None:
        if self._interval:
            start = max(self._now(), self._next)
            self._next = start + self._interval
            await self._sleep(start - self._now())


def _reply(completion: Any) -> Reply:
    """Servers differ: every step to the text may be missing, and words of the server may stand there instead."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    for part in (completion, choice):
        if getattr(part, "error", None):
            raise Refusal(_json(part))
    message = getattr(choice, "message", None)
    if message is None:
        raise _no_completion(_json(completion))
    if calls := getattr(message, "tool_calls", None):
        raise UnusableReply(f"the answer calls {_called(calls)}, and a row holds an answer in text alone")
    text, finish_reason = getattr(message, "content", None), getattr(choice, "finish_reason", None)
    if not isinstance(text, str) or not text.strip():
        why = f" (finish_reason {finish_reason!r})" if isinstance(finish_reason, str) else ""
        raise UnusableReply(f"an empty answer{why}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UnusableReply("half a surrogate pair in the answer")
    return Reply(text, finish_reason if isinstance(finish_reason, str) else None)


def _called(calls: Any) -> str:
    functions = [getattr(call, "function", None) for call in calls] if isinstance(calls, list) else []
    return ", ".join(repr(getattr(function, "name", None)) for function in functions) or "a tool"


def _no_completion(body: Any) -> UnusableReply:
    said = words_of(body)
    return UnusableReply("the reply is not the JSON of a chat completion" + (f": {said}" if said else ""))


def _json(part: Any) -> Any:
    """What the client made an object of; a reply that was no object it hands on as it came."""
    return part.to_dict() if isinstance(part, openai.BaseModel) else part


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the server asks to wait, where it says so in seconds."""
    try:
        seconds = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(seconds, LONGEST_RETRY_AFTER) if seconds >= 0 else None
