"""Workers of three stages are killed again and again under load: each request is answered once, and rightly."""

from __future__ import annotations

import json
import time

from brokers.server.local_broker import LocalBroker
from tests.soak.conftest import Tell
from tests.soak.harness.numeric_chain import CHAIN
from tests.soak.harness.worker_fleet import Fleet, Load, Member, chain_file, figures
from tests.support.brokers.foreign_client import Stranger
from tests.support.pipelines.processes import Machine

WORKERS = 2  # of each stage
WINDOW = 12  # two requests for each worker: each that is killed has work in hand
KILL_EVERY_S = 3.0
LONG_ROUNDS = 20  # a minute of it
SHORT_ROUNDS = 3


def test_workers_that_are_killed_all_the_time_cost_no_request_and_double_none(
    box: Machine, broker: LocalBroker, long: bool, tell: Tell
) -> None:
    path = chain_file(box.folder, seconds=0.05, every_s=0.005, window=WINDOW)
    fleet = Fleet(box, path, broker.address)
    standing = {name: [fleet.start(name) for _ in range(WORKERS)] for name in CHAIN}
    fleet.await_up(member for members in standing.values() for member in members)
    with Stranger(broker.address, [("sparse/local/results/numbers", 1)]) as subscriber:
        load = Load(box, path, broker.address)
        load.await_more(10)
        begin_s = time.monotonic()
        for number in range(LONG_ROUNDS if long else SHORT_ROUNDS):
            if long:
                time.sleep(max(0.0, begin_s + number * KILL_EVERY_S - time.monotonic()))
            fleet.await_up(replace_one_of_each(fleet, standing, same_ids=number % 2 == 0))
            # All that was in flight is answered: no request is so unlucky three times that it is taken for poison.
            load.await_more(WINDOW + 1)
        storm_s = time.monotonic() - begin_s
        load.await_more(50)
        summary = load.end()
        heard = [json.loads(subscriber.hear().payload)["index"] for _ in range(summary["requests"])]
        assert sorted(heard) == list(range(summary["requests"]))
        assert subscriber.nothing()
    fleet.assert_nobody_panicked()
    assert summary["retries"] > 0, "nobody had anything in hand: this was no test"
    tell(f"storm of {storm_s:.0f} s, {broker.kind}: {figures(summary, kills=fleet.killed)}")


def replace_one_of_each(fleet: Fleet, standing: dict[str, list[Member]], *, same_ids: bool) -> list[Member]:
    """Kill the oldest worker of each stage and start another, under its id or a new one; the new ones."""
    doomed = [members.pop(0) for members in standing.values()]
    fleet.kill(doomed)
    replaced = [fleet.start(member.stage, member.worker if same_ids else "") for member in doomed]
    for member in replaced:
        standing[member.stage].append(member)
    return replaced
