"""The rules of forwarding, on the virtual clock: the other instance is a list of outcomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from daemon.http.closing import Closing
from daemon.http.edge import Answer, Inbound, Receive, Scope, Send
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.forward import KNOCKS_A_SECOND_MAX, Relay
from daemon.http.links import NOT_STARTED, UNKNOWN, Outcome
from daemon.http.ports import ApiSettings
from machine.states import State
from machine.views import Holder
from tests.http.fakes import FakeInstance, World, settings

SEND = "/api/whatsapp/send-message"
REPAIR = "/api/whatsapp/accounts/support/repair"
HERE = b"answered here"
OVER = b"nobody is active here"
DONE = Answer(200, [], b"answered there")

Ask = Callable[[Inbound, Holder], Awaitable[Answer | Outcome]]


@dataclass
class FakeLink:
    """Other instances: `then` answers each try; `asked` lists who was asked."""

    then: Ask
    asked: list[tuple[str, float]] = field(default_factory=list)

    async def ask(self, inbound: Inbound, holder: Holder) -> Answer | Outcome:
        await trio.lowlevel.checkpoint()
        self.asked.append((holder.name, trio.current_time()))
        return await self.then(inbound, holder)


@dataclass
class Stage:
    """Two instances, `a` (ours) and `b`, and the relay of `a`."""

    world: World
    a: FakeInstance
    b: FakeInstance
    link: FakeLink
    closing: Closing
    given: ApiSettings
    local_calls: int = 0
    under_way: bool = False
    """Whether a term that ends here has begun what it was asked for."""

    def relay(self) -> Relay:
        return Relay(self.routes, self.a, self.given, self.link, closing=self.closing)

    async def routes(self, scope: Scope, receive: Receive, send: Send) -> None:
        await trio.lowlevel.checkpoint()
        self.local_calls += 1
        inbound: Inbound = scope["watchkeeper"]
        desk = self.a.desk
        over = desk is None or desk.over.is_set()
        listing = inbound.method == "GET" and inbound.path == "/api/whatsapp/accounts"
        inbound.not_active = over and not (listing and desk is None)
        inbound.begun = inbound.not_active and self.under_way
        body = OVER if inbound.not_active else HERE
        start: MutableMapping[str, Any] = {"type": "http.response.start", "status": 200}
        await send(start)
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def stage() -> Stage:
    async def answers(inbound: Inbound, holder: Holder) -> Answer | Outcome:
        return DONE

    world = World()
    return Stage(
        world,
        FakeInstance(world, "a"),
        FakeInstance(world, "b"),
        FakeLink(answers),
        Closing(),
        settings(handoff_wait_s=10),
    )


def asking(path: str = SEND, method: str = "POST", **more: Any) -> Inbound:
    return Inbound(request_id="r", method=method, path=path, query=b"", headers=[], **more)


def outcomes(*listed: Answer | Outcome) -> Ask:
    left = list(listed)

    async def ask(inbound: Inbound, holder: Holder) -> Answer | Outcome:
        return left.pop(0) if len(left) > 1 else left[0]

    return ask


async def never(inbound: Inbound, holder: Holder) -> Answer | Outcome:
    await trio.sleep_forever()


async def refusal(relay: Relay, inbound: Inbound) -> ErrorCode:
    with pytest.raises(ApiError) as raised:
        await relay.answer(inbound)
    return raised.value.code


async def test_own_term_answers_here(stage: Stage, autojump_clock: MockClock) -> None:
    stage.world.activate(stage.a)
    assert (await stage.relay().answer(asking())).body == HERE
    assert stage.link.asked == []


async def test_holder_elsewhere_answers(stage: Stage, autojump_clock: MockClock) -> None:
    stage.world.activate(stage.b)
    assert await stage.relay().answer(asking()) is DONE
    assert stage.local_calls == 0


async def test_request_waits_for_the_next_holder(stage: Stage, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:

        async def take_over() -> None:
            await trio.sleep(7)
            stage.world.activate(stage.b)

        nursery.start_soon(take_over)
        assert await stage.relay().answer(asking()) is DONE
    assert stage.link.asked == [("b", trio.current_time())]


async def test_request_is_answered_here_once_this_instance_takes_over(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:

        async def take_over() -> None:
            await trio.sleep(3)
            stage.world.activate(stage.a)

        nursery.start_soon(take_over)
        answer = await stage.relay().answer(asking(REPAIR))
    assert answer.body == HERE


async def test_own_name_in_the_lease_is_waited_for_not_asked(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    stage.a.desk = None  # the lease is ours, the term does not serve yet
    stage.a.state = State.PASSIVE
    assert await refusal(stage.relay(), asking()) is ErrorCode.NO_ACTIVE_INSTANCE
    assert stage.link.asked == []


async def test_nobody_in_time_is_no_active_instance(
    stage: Stage, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    with pytest.raises(ApiError, match="nothing was accepted") as raised:
        await stage.relay().answer(asking())
    assert raised.value.code is ErrorCode.NO_ACTIVE_INSTANCE
    assert raised.value.retry_after_s == 2
    assert trio.current_time() - began == pytest.approx(10, abs=0.3)


async def test_term_that_ends_midway_passes_the_request_on(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    assert stage.a.desk is not None
    stage.a.desk.end()  # still shown, but over: its methods raise NotActive
    async with trio.open_nursery() as nursery:

        async def take_over() -> None:
            await trio.sleep(2)
            stage.world.activate(stage.b)

        nursery.start_soon(take_over)
        assert await stage.relay().answer(asking(REPAIR)) is DONE
    assert stage.local_calls < 20


async def test_send_that_was_under_way_when_our_term_ended_is_never_called_not_accepted(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    assert stage.a.desk is not None
    stage.a.desk.end()
    stage.under_way = True
    assert await refusal(stage.relay(), asking()) is ErrorCode.HOLDER_UNREACHABLE
    assert stage.local_calls > 1


async def test_other_mutation_that_was_under_way_when_our_term_ended_is_not_made_again(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    assert stage.a.desk is not None
    stage.a.desk.end()
    stage.under_way = True
    assert await refusal(stage.relay(), asking(REPAIR)) is ErrorCode.HOLDER_UNREACHABLE
    assert stage.local_calls == 1


async def test_who_forwarded_hears_that_what_was_under_way_may_have_been_done(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    assert stage.a.desk is not None
    stage.a.desk.end()
    stage.under_way = True
    code = await refusal(stage.relay(), asking(forwarded_by="b"))
    assert code is ErrorCode.HOLDER_UNREACHABLE


async def test_refused_connections_are_tried_again_until_the_holder_is_back(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)
    stage.link.then = outcomes(NOT_STARTED, NOT_STARTED, DONE)
    assert await stage.relay().answer(asking(REPAIR)) is DONE
    moments = [at for _, at in stage.link.asked]
    assert [b - a for a, b in pairwise(moments)] == pytest.approx([0.25] * 2)


async def test_many_who_wait_ask_a_dead_holder_no_more_often_than_few(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.given = settings(handoff_wait_s=10, forwards_max=1000)
    stage.world.activate(stage.b)
    stage.link.then = outcomes(NOT_STARTED)
    relay = stage.relay()
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await relay.answer(asking(REPAIR)))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(ask)
        await trio.sleep(9)
        # Each once at the beginning, and then 200 a second.
        assert 1000 < len(stage.link.asked) <= 1000 + 9 * KNOCKS_A_SECOND_MAX + 1000
        stage.world.activate(stage.a)
        await trio.sleep(0.1)
        # Who takes its place answers all of them at once.
        assert [each.body for each in answers] == [HERE] * 1000


async def test_send_without_an_answer_is_made_again_under_its_id(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)
    stage.link.then = outcomes(UNKNOWN, DONE)
    assert await stage.relay().answer(asking()) is DONE
    assert len(stage.link.asked) == 2


async def test_other_mutation_without_an_answer_is_not_made_again(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)
    stage.link.then = outcomes(UNKNOWN, DONE)
    assert await refusal(stage.relay(), asking(REPAIR)) is ErrorCode.HOLDER_UNREACHABLE
    assert len(stage.link.asked) == 1


async def test_send_that_may_have_been_done_is_never_called_not_accepted(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)
    stage.link.then = outcomes(UNKNOWN)
    code = await refusal(stage.relay(), asking())
    assert code is ErrorCode.HOLDER_UNREACHABLE


async def test_hung_holder_is_left_for_its_successor(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)

    async def ask(inbound: Inbound, holder: Holder) -> Answer | Outcome:
        return await never(inbound, holder) if holder.epoch == 1 else DONE

    stage.link.then = ask
    async with trio.open_nursery() as nursery:

        async def take_over() -> None:
            await trio.sleep(4)
            stage.world.activate(None)  # a free lease alone is no reason to give up
            await trio.sleep(1)
            stage.world.activate(stage.b)

        nursery.start_soon(take_over)
        began = trio.current_time()
        assert await stage.relay().answer(asking()) is DONE
        assert trio.current_time() - began == pytest.approx(5, abs=0.1)


async def test_mutation_stays_with_a_slow_holder(stage: Stage, autojump_clock: MockClock) -> None:
    stage.world.activate(stage.b)

    async def slowly(inbound: Inbound, holder: Holder) -> Answer | Outcome:
        await trio.sleep(6)
        return DONE

    stage.link.then = slowly
    async with trio.open_nursery() as nursery:

        async def take_over() -> None:
            await trio.sleep(1)
            stage.world.activate(stage.a)

        nursery.start_soon(take_over)
        assert await stage.relay().answer(asking(REPAIR)) is DONE
    assert len(stage.link.asked) == 1


async def test_list_is_answered_by_the_store_soon(stage: Stage, autojump_clock: MockClock) -> None:
    began = trio.current_time()
    answer = await stage.relay().answer(asking("/api/whatsapp/accounts", "GET"))
    assert answer.body == HERE
    assert trio.current_time() - began == pytest.approx(2, abs=0.3)


async def test_forwarded_request_is_not_forwarded_again(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.b)
    inbound = asking(forwarded_by="c", forwarded_to="a-incarnation")
    began = trio.current_time()
    assert await refusal(stage.relay(), inbound) is ErrorCode.NOT_ACTIVE
    assert trio.current_time() == began
    assert stage.link.asked == []


async def test_request_meant_for_another_incarnation_is_not_answered_here(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.world.activate(stage.a)
    other = asking(forwarded_by="c", forwarded_to="a-former-incarnation")
    assert await refusal(stage.relay(), other) is ErrorCode.NOT_ACTIVE
    mine = asking(forwarded_by="c", forwarded_to="a-incarnation")
    assert (await stage.relay().answer(mine)).body == HERE


async def test_waiting_requests_are_limited(stage: Stage, autojump_clock: MockClock) -> None:
    stage.given = settings(forwards_max=3, handoff_wait_s=10)
    relay = stage.relay()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(refusal, relay, asking())
        await wait_all_tasks_blocked()
        began = trio.current_time()
        assert await refusal(relay, asking()) is ErrorCode.NO_ACTIVE_INSTANCE
        assert trio.current_time() == began
    # Those who waited have left: there is room again.
    stage.world.activate(stage.b)
    assert await relay.answer(asking()) is DONE


async def test_closing_api_ends_the_wait(stage: Stage, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:

        async def close() -> None:
            await trio.sleep(1)
            stage.closing.begin()

        nursery.start_soon(close)
        began = trio.current_time()
        assert await refusal(stage.relay(), asking()) is ErrorCode.NO_ACTIVE_INSTANCE
        assert trio.current_time() - began == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("inbound", "code"),
    [
        (asking(), ErrorCode.HOLDER_UNREACHABLE),
        (asking(REPAIR), ErrorCode.HOLDER_UNREACHABLE),
        (asking("/api/whatsapp/accounts/x", "GET"), ErrorCode.NO_ACTIVE_INSTANCE),
    ],
    ids=["send", "change", "read"],
)
@pytest.mark.parametrize("closes_first", [False, True])
async def test_closing_api_answers_before_its_end_though_the_holder_does_not(
    stage: Stage,
    autojump_clock: MockClock,
    inbound: Inbound,
    code: ErrorCode,
    closes_first: bool,
) -> None:
    stage.world.activate(stage.b)
    stage.link.then = never
    answer_by = trio.current_time() + 3
    async with trio.open_nursery() as nursery:

        async def close() -> None:
            await trio.sleep(0 if closes_first else 1)
            stage.closing.begin(answer_by)

        nursery.start_soon(close)
        await trio.sleep(0.5 if closes_first else 0)
        with trio.fail_after(60):
            assert await refusal(stage.relay(), inbound) is code
        assert trio.current_time() == answer_by
