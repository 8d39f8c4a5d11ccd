# SPDX-License-Identifier: GPL-2.0-or-later
"""A session that takes the place of another of its process."""

from __future__ import annotations

import errno

from privfs.notifier.effects import Effect, Forget, Send, Work
from privfs.notifier.owner import Owner
from privfs.notifier.user import User
from privfs.notifier.wire import Flag, Op, Record
from privfs.operation import Fallocate, Resize
from privfs.personality import RESIZABLE

PAGE = 4096
KEEP, PUNCH = 1, 3


class TestReplacing:
    """HELLO that names a broken session of the same process."""

    def broken(self) -> Owner:
        """An owner whose only user has lost its socket while a punch waits for it."""
        owner = Owner(RESIZABLE, 100)
        owner.create(5)
        owner.request(5, "size", Resize(8 * PAGE))
        owner.connect(1, 4711)
        owner.received(1, User().hello("old"))
        owner.received(1, Record(Op.REGISTER, Flag.FD, req=2, start=7), (5, True))
        owner.request(5, "fill", Fallocate(KEEP, 0, PAGE))
        owner.performed(5, "fill")
        owner.request(5, "punch", Fallocate(PUNCH, 0, PAGE))
        owner.broken(1, "test")
        assert owner.waiting_for(5, "punch") == {1}
        return owner

    def hello(self, owner: Owner, sid: int, pid: int, replaces: int) -> list[Effect]:
        owner.connect(sid, pid)
        return owner.received(sid, User().hello("new", replaces))

    def test_it_takes_the_old_one_out_of_every_wait_set(self) -> None:
        owner = self.broken()
        effects = self.hello(owner, 2, 4711, 1)
        assert [e.record.status for e in effects if isinstance(e, Send)] == [0]
        assert any(isinstance(e, Work) for e in effects)
        assert Forget(1) in effects
        assert list(owner.sessions) == [2]

    def test_another_process_cannot(self) -> None:
        owner = self.broken()
        effects = self.hello(owner, 2, 4712, 1)
        assert [e.record.status for e in effects if isinstance(e, Send)] == [errno.ESRCH]
        assert owner.waiting_for(5, "punch") == {1}

    def test_a_living_session_cannot_be_replaced(self) -> None:
        owner = Owner(RESIZABLE, 100)
        owner.connect(1, 4711)
        owner.received(1, User().hello("old"))
        effects = self.hello(owner, 2, 4711, 1)
        assert [e.record.status for e in effects if isinstance(e, Send)] == [errno.ESRCH]
        assert owner.sessions[1].talks

    def test_without_a_name_the_old_one_stays(self) -> None:
        owner = self.broken()
        self.hello(owner, 2, 4711, 0)
        assert owner.waiting_for(5, "punch") == {1}
