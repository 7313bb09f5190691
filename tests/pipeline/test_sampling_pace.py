"""How fast `wrpo sample` asks: so many requests at once, so many a minute, and not before a server wants."""

from __future__ import annotations

import asyncio

from scripted_server import completion, echo, serving

from wrpo.sampling.server import Pace, Server
from wrpo.sampling.sources import ServerSource

pytest_plugins = ("sampling_fixtures",)  # its fixtures


def test_no_more_requests_are_in_flight_than_asked_for(sample):
    with serving() as server:
        waiting = []

        def script(body, attempt):
            waiting.append(1)
            if len(waiting) >= 4:  # all four are here at once, or the test hangs until the time-out
                server.released.set()
            server.released.wait(5)
            return echo(body, attempt)

        server.script = script
        source = {"model": "a", "base_url": server.url, "concurrency": 4, "samples": 4}
        assert sample([source], ["p", "q", "r"]) == 0
        assert server.most_at_once == 4


def test_requests_start_no_faster_than_the_rate_limit(sample):
    with serving(lambda body, attempt: completion("") if attempt == 0 else echo(body, attempt)) as server:
        source = {"model": "a", "base_url": server.url, "requests_per_minute": 1200, "samples": 1}
        assert sample([source], [f"p{n}" for n in range(4)]) == 0
    # 8 requests, retries counted, 0.05 s apart; the first may be late on its way here by the time a request takes.
    assert len(server.times) == 8
    assert server.times[-1] - server.times[0] > 7 * 0.05 - 0.1


def test_a_pause_earns_no_burst():
    clock, starts = [0.0], []

    async def sleep(seconds: float) -> None:
        starts.append(clock[0] + seconds)

    async def play() -> None:
        pace = Pace(60, now=lambda: clock[0], sleep=sleep)  # one a second
        for when in (0.0, 0.0, 0.0, 10.0, 10.0):
            clock[0] = when
            await pace.turn()

    asyncio.run(play())
    assert starts == [0, 1, 2, 10, 11]


def test_a_server_that_says_when_to_come_again_is_not_asked_before(sample):
    slow_down = (429, {"error": {"message": "slow down"}}, {"retry-after": "0.4"})
    with serving(lambda body, attempt: slow_down if attempt == 0 else echo(body, attempt)) as server:
        assert sample([{"model": "a", "base_url": server.url, "samples": 1}], ["p"]) == 0
    assert server.times[1] - server.times[0] > 0.35  # the first is noted when it arrives, later than it was sent


def test_waits_double_up_to_a_minute_and_up_to_half_of_each_is_chance():
    server = Server(ServerSource(model="a", base_url="http://127.0.0.1:1/v1", retry_wait=2.0))
    for attempt, longest in enumerate((2, 4, 8, 16, 32, 60, 60)):
        waits = [server._seconds_to_wait(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest < 0.9 * longest < max(waits) <= longest
