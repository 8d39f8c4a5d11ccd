# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion in place on a VM at work: begin, prove, fill, end.

The rules are those of :mod:`kvmsim.inplace`; here is the order that makes them true. No vCPU and
nobody of the host is at the pages while they are filled: both got Retry from the beginning on, and
what they had before is flushed, or was a reference that refused the conversion.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from kvmsim.asking import Asking
from kvmsim.effect import NeedPage, PageGrant
from kvmsim.inplace import Attributes2, ConvertFile, Fill
from kvmsim.region import PrivateFile
from kvmsim.running import RunningVm
from kvmsim.uapi import PAGE_SHIFT, PAGE_SIZE, KvmError

_OPERATION: Final = "KVM_SET_MEMORY_ATTRIBUTES2"


class Conversions:
    """The conversions of one VM; its caller lets one at a time in, and no change of slots."""

    def __init__(self, running: RunningVm) -> None:
        self._running = running
        self._asking = Asking(running, _OPERATION)

    def convert(self, file: PrivateFile, request: Attributes2) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2 on ``file``, which this VM is a user of (no lock held).

        ConversionError changes nothing. KvmError or LinkError: the owner could not be asked, no
        index has another type, and pages may have been filled.
        """
        running = self._running
        with running.lock:
            begun = running.vm.begin_set_memory_attributes2(file, request)
        try:
            # Also without a leaf: an earlier zap of these pages may still wait for its flush.
            running.flush_zapped(begun.zapped)
            assert isinstance(begun.then, ConvertFile)
            self._fill(begun.then)
        except BaseException:
            with running.lock:
                running.vm.abandon(begun)
            raise
        with running.lock:
            running.vm.end(begun)

    def _fill(self, convert: ConvertFile) -> None:
        """Write to the allocated pages of a range; what is not allocated stays so."""
        if convert.fill is Fill.KEEP:
            return
        # What is punched between this answer and a question comes back as a page of zeros.
        for first, last in self._running.private.runs(convert.file, convert.start, convert.end):
            at, again = first, False
            while at < last:
                end = min(last, at + self._running.vm.mmu.window)
                grant = self._asking.page(NeedPage(convert.file, at, at, end, True), again=again)
                done = self._write(convert, grant, at, end)
                again = done == at
                at = done

    def _write(self, convert: ConvertFile, grant: PageGrant, page: int, end: int) -> int:
        """Fill what was granted from ``page`` on; the page to go on with."""
        mmu = self._running.vm.mmu
        if grant.status or grant.file != convert.file or not grant.start <= page < grant.end:
            raise KvmError(
                grant.status or errno.EIO, _OPERATION, "the owner has no such page",
                start=page << PAGE_SHIFT, size=PAGE_SIZE,
            )  # fmt: skip
        size = (min(end, grant.end) - page) * PAGE_SIZE
        data = bytes(size) if convert.fill is Fill.ZERO else os.urandom(size)
        # The copy is under the lock that a zap takes: see kvmsim.populate.
        with self._running.lock:
            start, last = mmu.backing.installable(
                grant.file, page, grant.start, grant.end, grant.seq
            )
            hpa = mmu.backing.hpa(grant.instance, page)
            if not start <= page < last or hpa is None:
                return page
            if (convert.file, page) in mmu.poison:  # nobody reads it before it is given back
                return page + 1
            _, last = mmu.poison.clip(convert.file, page, page, min(end, last, grant.end))
            if mmu.backing.hpa(grant.instance, last - 1) != hpa + (last - 1 - page) * PAGE_SIZE:
                last = page + 1
            size = (last - page) * PAGE_SIZE
            self._running.host.admit(hpa, size)
            self._running.host.write(hpa, data[:size])
        return last
