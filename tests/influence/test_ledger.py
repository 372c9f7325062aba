"""Leases under random deaths, expiries, late commits and ledgers that die: every example has its row exactly once."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from montessori_ray.influence.ledger import ALONE_DEATHS, WAIT, Lease, Ledger, Outstanding

GROUPS = ("a", "b", "c")
TIMEOUT = 10.0


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def examples(start: int, count: int) -> list[dict[str, Any]]:
    return [{"example_id": f"e{index}"} for index in range(start, start + count)]


def done(lease: Lease, by: str = "") -> list[dict[str, Any]]:
    return [{"example_id": example["example_id"], "by": by} for example in lease.examples]


def ids(lease: object) -> list[str]:
    assert isinstance(lease, Lease)
    return [example["example_id"] for example in lease.examples]


def ledger_of(count: int, lease_size: int = 2) -> tuple[Ledger, Clock]:
    clock = Clock()
    ledger = Ledger(lease_size, TIMEOUT, clock)
    ledger.extend(examples(0, count))
    return ledger, clock


def test_leases_go_out_in_order_and_end() -> None:
    ledger, _ = ledger_of(3)
    first, second = ledger.lease("a"), ledger.lease("b")
    assert (ids(first), ids(second)) == (["e0", "e1"], ["e2"])
    for lease in (first, second):
        assert isinstance(lease, Lease)
        assert ledger.lease("a") is WAIT
        ledger.commit(lease.id, done(lease))
    assert ledger.lease("a") is WAIT, "only the driver knows that all rows have arrived"
    ledger.close()
    assert ledger.lease("a") is None
    assert [row["example_id"] for row in ledger.drain()] == ["e0", "e1", "e2"]
    assert ledger.drain() == []


def test_an_expired_lease_returns_to_the_front_and_the_first_result_wins() -> None:
    ledger, clock = ledger_of(4)
    slow = ledger.lease("a")
    clock.now = TIMEOUT
    again = ledger.lease("b")
    assert ids(slow) == ids(again) == ["e0", "e1"]
    assert isinstance(slow, Lease)
    assert isinstance(again, Lease)
    ledger.commit(slow.id, done(slow, "a"))
    ledger.commit(again.id, done(again, "b"))
    assert [row["by"] for row in ledger.drain()] == ["a", "a"]
    assert ids(ledger.lease("b")) == ["e2", "e3"]


def test_a_commit_postpones_the_deadline() -> None:
    ledger, clock = ledger_of(2)
    lease = ledger.lease("a")
    assert isinstance(lease, Lease)
    clock.now = TIMEOUT - 1
    ledger.commit(lease.id, done(lease)[:1])
    clock.now = TIMEOUT + 1
    assert ledger.lease("b") is WAIT
    clock.now = 2 * TIMEOUT
    assert ids(ledger.lease("b")) == ["e1"]


def test_a_dead_groups_leases_return_at_once() -> None:
    ledger, _ = ledger_of(3)
    lease = ledger.lease("a")
    assert isinstance(lease, Lease)
    ledger.commit(lease.id, done(lease)[:1])
    ledger.release("a")
    trial = ledger.lease("b")
    assert ids(trial) == ["e0"], "nothing is known of this group, and this example can be scored"
    assert isinstance(trial, Lease)
    assert trial.alone
    assert ledger.lease("b") is WAIT, "nor does it get a second one"
    ledger.commit(trial.id, done(trial, "b"))
    assert ids(ledger.lease("b")) == ["e1"], "suspects go first, one by one"
    assert ids(ledger.lease("c")) == ["e2"]
    assert [row["by"] for row in ledger.drain()] == [""], "the trial's row is nobody's"


def score_all(ledger: Ledger, culprits: set[str], unsent: int = 0) -> int:
    """One group, which dies over the culprits and keeps so many finished rows back; returns how often it died."""
    deaths, lease = 0, ledger.lease("a")
    while isinstance(lease, Lease):
        following = None if lease.alone else ledger.lease("a")
        before = [row["example_id"] in culprits for row in lease.examples]
        if any(before):
            ledger.commit(lease.id, done(lease)[: max(0, before.index(True) - unsent)])
            ledger.release("a")
            deaths += 1
            following = None
        else:
            ledger.commit(lease.id, done(lease))
        lease = following if isinstance(following, Lease) else ledger.lease("a")
    return deaths


@pytest.mark.parametrize("lease_size", [1, 2, 5, 20])
@pytest.mark.parametrize("unsent", [0, 1, 20])
@pytest.mark.parametrize("culprit", ["e0", "e4", "e9", "e11"])
def test_only_the_example_that_kills_its_groups_is_given_up(lease_size: int, unsent: int, culprit: str) -> None:
    ledger, _ = ledger_of(12, lease_size)
    assert score_all(ledger, {culprit}, unsent) == 1 + ALONE_DEATHS
    rows = {row["example_id"]: row.get("quarantine") for row in ledger.drain()}
    assert len(rows) == 12
    assert {example_id for example_id, reason in rows.items() if reason} == {culprit}
    assert rows[culprit] == "its scoring group died 2 times while scoring it and nothing else"


def test_of_several_such_examples_each_is_found() -> None:
    ledger, _ = ledger_of(12, 3)
    score_all(ledger, {"e2", "e3", "e8"}, 2)
    assert {row["example_id"] for row in ledger.drain() if row.get("quarantine")} == {"e2", "e3", "e8"}


def test_a_group_that_died_over_one_example_is_known() -> None:
    ledger, _ = ledger_of(2, 2)
    ledger.lease("a")
    ledger.release("a")
    assert ledger.over_one() == set(), "two examples were out"
    assert isinstance(ledger.lease("b"), Lease)
    ledger.release("b")
    assert ledger.over_one() == {"b"}


EVERY_THIRD = range(0, 60, 3)


@pytest.mark.parametrize("lease_size", [3, 8])
@pytest.mark.parametrize(
    "culprits", [[], [0], range(53, 60), range(13), [8, 16, 24, 32], EVERY_THIRD, range(1, 60)], ids=str
)
def test_any_number_of_such_examples_is_outlived_wherever_they_are(culprits: Sequence[int], lease_size: int) -> None:
    """A group that has died four times is followed by another if it died over a single example."""
    deadly = {f"e{number}" for number in culprits}
    ledger, _ = ledger_of(60, lease_size)
    one_session(ledger, deadly)
    rows = {row["example_id"]: row for row in ledger.drain()}
    assert len(rows) == 60
    assert {example_id for example_id, row in rows.items() if row.get("quarantine")} == deadly


@pytest.mark.parametrize("breaks_after", [0, 1, 3])
def test_no_example_is_blamed_for_a_machine_that_kills_whatever_it_is_given(breaks_after: int) -> None:
    """It is retired, whatever it did before it broke, and the others score what it died over."""
    ledger, _ = ledger_of(40, 4)
    deaths = turns = 0
    while ledger.open():
        turns += 1
        if deaths < 4 and isinstance(lease := ledger.lease("broken"), Lease):
            if turns > breaks_after:
                ledger.release("broken")
                deaths += 1
            else:
                ledger.commit(lease.id, done(lease, "broken"))
        lease = ledger.lease("b")
        assert isinstance(lease, Lease)
        ledger.commit(lease.id, done(lease, "b"))
    assert (deaths, "broken" in ledger.over_one()) == (4, False)
    assert not [row for row in ledger.drain() if row.get("quarantine")]


def test_where_every_example_kills_the_session_ends() -> None:
    """It is not the examples: nothing is given up."""
    ledger, _ = ledger_of(12, 3)
    one_session(ledger, {f"e{number}" for number in range(12)})
    assert (ledger.drain(), ledger.open()) == ([], 12)


def one_session(ledger: Ledger, deadly: set[str]) -> None:
    """One group at a time, until all is scored or a group has died four times and none is to follow it."""
    group, deaths = 0, 0
    while isinstance(lease := ledger.lease(f"g{group}"), Lease):
        kills = any(row["example_id"] in deadly for row in lease.examples)
        ledger.commit(lease.id, [row for row in done(lease) if row["example_id"] not in deadly])
        if kills:
            ledger.release(f"g{group}")
            deaths += 1
        if deaths == 4:
            if f"g{group}" not in ledger.over_one():
                return
            group, deaths = group + 1, 0


def test_no_example_of_a_bigger_lease_is_blamed_however_often_groups_are_killed() -> None:
    ledger, _ = ledger_of(40, lease_size=4)
    for _ in range(5):
        ledger.lease("a"), ledger.lease("a")
        ledger.release("a")
    assert (ledger.drain(), ledger.open(), ledger.backlog()) == ([], 40, 40)
    assert score_all(ledger, set()) == 0
    assert len(ledger.drain()) == 40


def test_a_group_that_lets_a_lease_run_out_is_late_until_it_asks_again_or_dies() -> None:
    ledger, clock = ledger_of(4)
    ledger.lease("a"), ledger.lease("b")
    assert ledger.late() == set()
    clock.now = TIMEOUT
    assert ledger.late() == {"a", "b"}
    ledger.lease("a")
    ledger.release("b")
    assert ledger.late() == set()


def test_examples_handed_over_again_are_not_scored_again() -> None:
    ledger, _ = ledger_of(3)
    lease = ledger.lease("a")
    assert isinstance(lease, Lease)
    ledger.commit(lease.id, done(lease)[:1])
    ledger.extend(examples(0, 3))
    assert (ledger.open(), ledger.backlog()) == (2, 1)
    assert ids(ledger.lease("a")) == ["e2"]
    assert [row["example_id"] for row in ledger.drain()] == ["e0"]


def test_what_a_dead_ledger_had_out_is_leased_again_and_late_rows_of_it_are_harmless() -> None:
    outstanding = Outstanding()
    outstanding.add(examples(0, 4))
    before, _ = ledger_of(4)
    old = before.lease("a")
    assert isinstance(old, Lease)
    after = Ledger(2, TIMEOUT, Clock(), first_lease=old.id + 1)
    after.commit(old.id, done(old, "late"))
    assert outstanding.take(after.drain()) == []
    lost = outstanding.lost(after.open())
    assert lost == examples(0, 4)
    after.extend(lost)
    new = after.lease("b")
    assert isinstance(new, Lease)
    assert ids(new) == ids(old)
    after.commit(old.id, done(old, "late"))
    after.commit(new.id, done(new, "again"))
    assert [row["by"] for row in outstanding.take(after.drain())] == ["late", "late"]
    assert (len(outstanding), outstanding.lost(after.open())) == (2, [])


class LedgerMachine(RuleBasedStateMachine):
    """Groups lease, commit in part, late or twice, die, hang; the ledger dies, its answers get lost; in any order."""

    leases = Bundle("leases")

    @initialize(lease_size=st.integers(1, 4))
    def start(self, lease_size: int) -> None:
        self.clock = Clock()
        self.lease_size = lease_size
        self.ledger = Ledger(lease_size, TIMEOUT, self.clock)
        self.outstanding = Outstanding()
        self.added = 0
        self.lives = 0
        self.rows: list[str] = []

    @rule(count=st.integers(1, 5), times=st.sampled_from((1, 1, 2)))
    def extend(self, count: int, times: int) -> None:
        new = examples(self.added, count)
        self.added += count
        self.outstanding.add(new)
        for _ in range(times):
            self.ledger.extend(new)

    @rule(target=leases, group=st.sampled_from(GROUPS))
    def lease(self, group: str) -> Any:
        lease = self.ledger.lease(group)
        return lease if isinstance(lease, Lease) else multiple()

    @rule(lease=leases, part=st.slices(4))
    def commit(self, lease: Lease, part: slice) -> None:
        self.ledger.commit(lease.id, done(lease)[part])

    @rule(group=st.sampled_from(GROUPS))
    def die(self, group: str) -> None:
        self.ledger.release(group)

    @rule(seconds=st.floats(0, 2 * TIMEOUT))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def the_ledger_dies(self) -> None:
        self.lives += 1
        self.ledger = Ledger(self.lease_size, TIMEOUT, self.clock, first_lease=1_000_000 * self.lives)

    @rule()
    def an_answer_is_lost(self) -> None:
        self.ledger.drain()

    @rule()
    def look(self) -> None:
        self.rows += [row["example_id"] for row in self.outstanding.take(self.ledger.drain())]
        self.ledger.extend(self.outstanding.lost(self.ledger.open()))
        assert self.ledger.open() == len(self.outstanding)

    @invariant()
    def nothing_twice_nothing_kept(self) -> None:
        assert len(set(self.rows)) == len(self.rows)
        assert len(self.rows) + len(self.outstanding) == self.added
        assert len(self.ledger._finished) + self.ledger.open() <= len(self.outstanding)

    def teardown(self) -> None:
        """One healthy group finishes what is left."""
        self.look()
        self.clock.now += 2 * TIMEOUT
        while isinstance(lease := self.ledger.lease("healthy"), Lease):
            self.ledger.commit(lease.id, done(lease))
        self.look()
        assert not self.outstanding
        assert sorted(self.rows) == sorted(row["example_id"] for row in examples(0, self.added))


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestLedgerMachine = LedgerMachine.TestCase
