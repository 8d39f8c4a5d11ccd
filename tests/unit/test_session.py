# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import pytest

from privfs.notifier.session import TRANSITIONS, Event, IllegalEvent, Session, State
from privfs.notifier.wire import Fence

MISSING = [(s, e) for s in State for e in Event if (s, e) not in TRANSITIONS]


def session(state: State) -> Session:
    made = Session(7, 4711)
    made.state = state
    return made


@pytest.mark.parametrize(("state", "event"), TRANSITIONS, ids=lambda value: value.name)
def test_every_row(state: State, event: Event) -> None:
    subject = session(state)
    subject.feed(event)
    assert subject.state is TRANSITIONS[state, event]


@pytest.mark.parametrize(("state", "event"), MISSING, ids=lambda value: value.name)
def test_every_missing_pair_raises_and_changes_nothing(state: State, event: Event) -> None:
    subject = session(state)
    before = subject.key()
    with pytest.raises(IllegalEvent, match=f"session 7 .*{event.value!r} in state {state.value!r}"):
        subject.feed(event)
    assert subject.key() == before
    assert subject.state is state


def test_gone_is_final_and_only_an_orderly_end_or_a_proof_leads_there() -> None:
    assert not any(state is State.GONE for state, _ in TRANSITIONS)
    leads = {(s, e) for (s, e), to in TRANSITIONS.items() if to is State.GONE}
    assert {e for _, e in leads} == {Event.BYE, Event.EXIT, Event.REPLACED}
    # A process that was killed must be seen dead; a broken socket proves nothing.
    assert {s for s, e in leads if e is Event.BYE} == {State.OPEN, State.ZOMBIE}


def test_who_was_killed_stays_so_until_its_exit_is_seen() -> None:
    """Neither giving up nor a fence makes up for the exit: it only makes it less urgent."""
    condemned = {state for state in State if session(state).condemned}
    assert condemned == {State.KILLED, State.UNPROVEN, State.FENCED}
    for (state, event), after in TRANSITIONS.items():
        if state in condemned:
            assert after in condemned or event is Event.EXIT
        if after is State.FENCED:
            assert state in condemned


def test_only_an_open_session_talks() -> None:
    assert [state for state in State if session(state).talks] == [State.OPEN]


def test_the_name_goes_to_people() -> None:
    subject = session(State.OPEN)
    assert subject.name == "user(4711)"
    subject.label = "guest0"
    assert subject.name == "guest0(4711)"


def test_a_copy_is_independent() -> None:
    subject = session(State.OPEN)
    subject.files[1] = True
    subject.sent[3] = (1, "op")
    subject.known.add((1, 1))
    twin = subject.copy()
    assert twin.key() == subject.key()
    assert (twin.sid, twin.pid, twin.label) == (subject.sid, subject.pid, subject.label)
    twins = [subject.copy() for _ in range(6)]
    twins[0].files.clear()
    twins[1].sent.clear()
    twins[2].known.clear()
    twins[3].feed(Event.BREAK)
    twins[4].calling.add(5)
    twins[5].fence = Fence.UFFD
    assert len({subject.key(), *(twin.key() for twin in twins)}) == 7
    assert subject.sent == {3: (1, "op")}
