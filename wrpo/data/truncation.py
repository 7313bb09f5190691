"""Which tokens stay when a row is too long: three steps, in this order.

    1. A prompt longer than `max_prompt_length` loses tokens from the left down to it.
    2. If prompt + longest response exceed `max_length`, the prompt loses more from the left until that response fits,
       but keeps at least half of `max_length`.
    3. Each response on its own loses tokens from the right down to the room that the prompt leaves.

So a row that fits is not touched by 2 and 3; responses stay whole as long as the prompt can pay for it; a response that
is cut still has at least half of `max_length`, and none is ever cut to nothing. A beginning-of-sequence token at the
front of the prompt survives its cut: models that are trained with one misbehave without.

The WRPO authors' code has the same two limits and another rule: it leaves a prompt that is too long alone where the row
fits, and cuts every response to max_length - max_prompt_length once one does not.
"""

from __future__ import annotations


def truncate(
    prompt: list[int],
    responses: list[list[int]],
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    bos_token_id: int | None = None,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each response after the three steps above.

    Args:
        prompt, responses: token ids.
        max_length: most tokens in prompt + one response, at least 2; None: no limit.
        max_prompt_length: most tokens in the prompt; None: no limit of its own.
        bos_token_id: kept at the front when the prompt starts with it.
    """
    keep = len(prompt)
    if max_prompt_length is not None:
        keep = min(keep, max_prompt_length)
    if max_length is not None:
        longest = max(len(response) for response in responses)
        keep = min(keep, max(max_length - longest, max_length // 2))
        responses = [response[: max_length - keep] for response in responses]
    return _last(prompt, keep, bos_token_id), responses


def _last(prompt: list[int], keep: int, bos_token_id: int | None) -> list[int]:
    if len(prompt) <= keep:
        return prompt
    start = prompt[:1] if keep > 0 and bos_token_id is not None and prompt[0] == bos_token_id else []
    return start + prompt[len(prompt) - keep + len(start) :]
