# SPDX-License-Identifier: GPL-2.0-or-later
"""The AMD-SP: launches guests, measures them, lends pages back, and attests.

Every command asks its table in `hwemu.snp.fwrules`, then does all of it or, refused, nothing:
`FirmwareRefused` names the status, the command and what was in the way.  Only a CPUID page that is
refused is changed, as the firmware ABI says: it then holds what would be accepted.

Pages are numbers of 4 KiB frames.  Keys and identities derive from the secret of the machine.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwemu.snp import guestmessage
from hwemu.snp.asids import Asids, AsidState
from hwemu.snp.check import failing
from hwemu.snp.cpuidpage import CpuidLimits, corrected
from hwemu.snp.fwrules import COMMANDS, MOVES, RECLAIMS, Asked
from hwemu.snp.fwstatus import Command, FirmwareRefused, FwStatus
from hwemu.snp.guestcontext import TRANSITIONS, GuestContext, IdBlock
from hwemu.snp.guestmessage import Message, MessageType
from hwemu.snp.launch import PageInfo, PageType, contents_digest
from hwemu.snp.memory import Memory
from hwemu.snp.report import Report, pack
from hwemu.snp.rmp import Rmp
from hwemu.snp.rmpentry import FULL, PAGE_SIZE, VMPLS, PageSize, PageState, state_of


@dataclass(frozen=True, slots=True)
class VmplMasks:
    """Permissions that SNP_LAUNCH_UPDATE gives the lesser VMPLs."""

    vmpl1: int = 0
    vmpl2: int = 0
    vmpl3: int = 0


NO_MASKS = VmplMasks()


class Firmware:
    """The AMD-SP of one machine, over its table and its memory.

    ``secret`` is the machine's: its chip id, report keys and guests' keys come from it.
    """

    def __init__(
        self,
        rmp: Rmp,
        memory: Memory,
        *,
        secret: bytes = b"privfs",
        smt: bool = True,
        cpuid: CpuidLimits | None = None,
    ) -> None:
        self.rmp = rmp
        self._memory = memory
        self._secret = secret
        self._smt = smt
        self._cpuid = cpuid
        self._initialized = False
        self._guests: dict[int, GuestContext] = {}
        self._asids = Asids(rmp.max_asid)
        self._made = 0

    # -- asking -----------------------------------------------------------------------------------

    def _ask(self, command: Command, **operands: Any) -> Asked:
        gctx = operands.get("gctx", 0)
        asked = Asked(
            command, self.rmp, self._initialized, self._smt, self._asid_state,
            guest=self._guests.get(gctx) if "gctx" in operands else None, **operands,
        )  # fmt: skip
        refused = failing(COMMANDS[command], asked)
        if refused:
            raise FirmwareRefused(FwStatus(refused.status), self._what(asked, refused.must))
        return asked

    def _what(self, asked: Asked, must: str) -> str:
        parts = [asked.command.name]
        if asked.guest:
            parts.append(f"guest {asked.gctx:#x} in {asked.guest.state}, asid {asked.guest.asid}")
        for name, pfn in (("page", asked.page), ("target", asked.target)):
            if pfn and self.rmp.covered(pfn):
                parts.append(f"{name} {pfn:#x} {self.rmp.raw(pfn)}")
        return f"{', '.join(parts)}: refused, since not: {must}"

    def _asid_state(self, asid: int) -> AsidState | None:
        return self._asids.state(asid) if 0 < asid <= self._asids.last else None

    def _advance(self, asked: Asked, **changes: Any) -> None:
        state = TRANSITIONS[asked.who.state, asked.command]
        assert state is not None
        self._guests[asked.gctx] = replace(asked.who, state=state, **changes)

    def _derive(self, label: str, size: int) -> bytes:
        """Return bytes of this machine for a purpose; another call with the label, others."""
        self._made += 1
        words = f"{label} {self._made}".encode()
        return hmac.new(self._secret, words, hashlib.sha384).digest()[:size]

    # -- the platform -----------------------------------------------------------------------------

    def init(self) -> None:
        """SNP_INIT."""
        self._ask(Command.SNP_INIT)
        self._initialized = True

    def wbinvd(self) -> None:
        """WBINVD on every core; not a command, but SNP_DF_FLUSH asks for it."""
        self._asids.wbinvd()

    def df_flush(self) -> None:
        """SNP_DF_FLUSH: ASIDs of guests that are gone can be used again."""
        self._ask(Command.SNP_DF_FLUSH)
        self._asids.df_flush()

    def asid_state(self, asid: int) -> AsidState:
        """Return where an ASID is in its life; FirmwareRefused(INVALID_ASID) if there is none."""
        return self._asids.state(asid)

    # -- guests -----------------------------------------------------------------------------------

    def gctx_create(self, gctx: int) -> None:
        """SNP_GCTX_CREATE: make a Firmware page the context of a new guest."""
        self._ask(Command.SNP_GCTX_CREATE, gctx=gctx)
        self._memory.zero(gctx)
        self.rmp.store(gctx, replace(self.rmp.raw(gctx), vmsa=True))
        self._guests[gctx] = GuestContext()

    def launch_start(
        self, gctx: int, policy: int, *, imi: bool = False, gosvw: bytes = bytes(16)
    ) -> None:
        """SNP_LAUNCH_START."""
        asked = self._ask(Command.SNP_LAUNCH_START, gctx=gctx, policy=policy)
        keys = tuple(self._derive("VMPCK", 32) for _ in range(VMPLS))
        self._advance(
            asked, policy=policy, imi=imi, gosvw=gosvw, keys=keys,
            report_id=self._derive("report id", 32),
        )  # fmt: skip

    def activate(self, gctx: int, asid: int) -> None:
        """SNP_ACTIVATE: give the guest an ASID."""
        asked = self._ask(Command.SNP_ACTIVATE, gctx=gctx, asid=asid)
        self._asids.activate(asid)
        self._advance(asked, asid=asid)

    def launch_update(
        self,
        gctx: int,
        page: int,
        page_type: int,
        size: int = PageSize.SIZE_4K,
        *,
        imi: bool = False,
        masks: VmplMasks = NO_MASKS,
    ) -> None:
        """SNP_LAUNCH_UPDATE: measure a Pre-Guest page in, and make it Guest-Valid or a VMSA.

        INVALID_PARAM for a CPUID page that claims what the machine has not; the page then holds
        what would be accepted, and stays Pre-Guest.
        """
        asked = self._ask(
            Command.SNP_LAUNCH_UPDATE, gctx=gctx, page=page, page_type=page_type, size=size, imi=imi
        )
        kind, entry, guest = PageType(page_type), self.rmp.raw(page), asked.who
        frames = range(page, page + self.rmp.pages(size))
        if kind is PageType.CPUID:
            self._agree(page, asked)
        digest = guest.digest
        for frame in frames:
            contents = contents_digest(kind, self._memory.read(frame))
            gpa = entry.gpa + (frame - page) * PAGE_SIZE
            digest = PageInfo(
                digest, contents, kind, gpa, imi, masks.vmpl1, masks.vmpl2, masks.vmpl3
            ).extended()
        if kind is PageType.ZERO:
            for frame in frames:
                self._memory.zero(frame)
        elif kind is PageType.SECRETS:
            self._memory.write(page, guest.secrets().ljust(PAGE_SIZE, b"\0"))
        permissions = (FULL, masks.vmpl1 & FULL, masks.vmpl2 & FULL, masks.vmpl3 & FULL)
        self.rmp.store(
            page,
            replace(
                entry,
                immutable=False,
                validated=True,
                vmsa=kind is PageType.VMSA,
                permissions=permissions,
            ),
        )
        self._advance(asked, digest=digest)

    def _agree(self, page: int, asked: Asked) -> None:
        if self._cpuid is None:
            return
        contents = self._memory.read(page)
        accepted = corrected(contents, self._cpuid)
        if accepted is None:
            raise FirmwareRefused(
                FwStatus.INVALID_PARAM, self._what(asked, "the CPUID page is well-formed")
            )
        if accepted != contents:
            self._memory.write(page, accepted)
            raise FirmwareRefused(
                FwStatus.INVALID_PARAM, self._what(asked, "the CPUID page claims what there is")
            )

    def launch_finish(
        self, gctx: int, *, host_data: bytes = bytes(32), id_block: IdBlock | None = None
    ) -> None:
        """SNP_LAUNCH_FINISH: nothing more is measured; the guest may run and ask for reports."""
        if len(host_data) != 32:
            raise FirmwareRefused(
                FwStatus.INVALID_PARAM, f"SNP_LAUNCH_FINISH: host data has {len(host_data)} bytes"
            )
        asked = self._ask(Command.SNP_LAUNCH_FINISH, gctx=gctx, id_block=id_block)
        self._advance(asked, host_data=host_data, id_block=id_block)

    def guest_status(self, gctx: int) -> GuestContext:
        """SNP_GUEST_STATUS."""
        return self._ask(Command.SNP_GUEST_STATUS, gctx=gctx).who

    def decommission(self, gctx: int) -> None:
        """SNP_DECOMMISSION: forget the guest; its context page is a Firmware page again.

        Its pages stay assigned to the ASID until RMPUPDATE takes them, and the ASID is not free
        before `wbinvd` and `df_flush`.
        """
        asked = self._ask(Command.SNP_DECOMMISSION, gctx=gctx)
        if asked.who.asid:
            self._asids.deactivate(asked.who.asid)
        del self._guests[gctx]
        self._memory.zero(gctx)
        self.rmp.store(gctx, replace(self.rmp.raw(gctx), vmsa=False))

    # -- pages ------------------------------------------------------------------------------------

    def md_init(self, gctx: int, page: int) -> None:
        """SNP_MD_INIT: make a Firmware page one for metadata of the guest's swapped pages."""
        asked = self._ask(Command.SNP_MD_INIT, gctx=gctx, page=page)
        for frame in range(page, page + self.rmp.pages(self.rmp.raw(page).size)):
            self._memory.zero(frame)
        self.rmp.store(page, replace(self.rmp.raw(page), gpa=gctx * PAGE_SIZE))
        self._advance(asked)

    def page_move(self, gctx: int, source: int, target: int, size: int = PageSize.SIZE_4K) -> None:
        """SNP_PAGE_MOVE: another frame takes over contents, gpa and permissions.

        The target of a page of a guest may be used at once; the source is left Guest-Invalid.
        """
        asked = self._ask(Command.SNP_PAGE_MOVE, gctx=gctx, page=source, target=target, size=size)
        old, new = self.rmp.raw(source), self.rmp.raw(target)
        after = MOVES[state_of(old), state_of(new)]
        for step in range(self.rmp.pages(size)):
            self._memory.copy(source + step, target + step)
        if old.asid:
            self.rmp.store(target, replace(old, immutable=False))
            self.rmp.store(source, replace(old, immutable=False, validated=False))
        else:
            self.rmp.store(target, replace(new, gpa=old.gpa))
            self.rmp.store(source, replace(old, gpa=0, vmsa=False))
        assert (self.rmp.state(source), self.rmp.state(target)) in (
            after, (after[0], PageState.VMSA)
        )  # fmt: skip
        self._advance(asked)

    def page_move_range(
        self, gctx: int, source: int, target: int, npages: int
    ) -> tuple[int, FirmwareRefused | None]:
        """SNP_PAGE_MOVE of ``npages`` small pages in a row; how many are done, and what stopped it.

        What a loop of `page_move` does, as a whole where that can be.
        """
        alike = self._alike((source, target), npages)
        if alike and abs(source - target) >= npages:
            try:
                for step in alike:
                    asked = self._ask(
                        Command.SNP_PAGE_MOVE, gctx=gctx, page=source + step, target=target + step
                    )
            except FirmwareRefused:
                pass
            else:
                for step in range(npages):
                    self._memory.copy(source + step, target + step)
                self.rmp.move_run(source, target, npages)
                self._advance(asked)
                return npages, None
        for step in range(npages):
            try:
                self.page_move(gctx, source + step, target + step)
            except FirmwareRefused as refused:
                return step, refused
        return npages, None

    def _alike(self, pfns: tuple[int, ...], npages: int) -> list[int]:
        """Steps that stand for all of ``npages`` small pages of guests from each of ``pfns`` on:
        for a command that asks for states and owners alone.  Empty if they are not such.
        """
        kinds = np.zeros(npages, np.int64)
        for pfn in pfns:
            found = self.rmp.columns(np.arange(pfn, pfn + npages, dtype=np.int64))
            if found.large.any() or not found.asid.all():
                return []
            kinds = kinds << 24 | found.asid.astype(np.int64) << 8 | found.state
        steps: list[int] = np.unique(kinds, return_index=True)[1].tolist()
        return steps

    def page_reclaim(self, page: int, size: int = PageSize.SIZE_4K) -> None:
        """SNP_PAGE_RECLAIM: let the hypervisor have a page that the AMD-SP was lent.

        Nothing happens to a page that is not immutable.
        """
        self._ask(Command.SNP_PAGE_RECLAIM, page=page, size=size)
        entry = self.rmp.raw(page)
        if entry.immutable:
            assert state_of(entry) in RECLAIMS
            self.rmp.store(page, replace(entry, immutable=False))

    def page_reclaim_range(self, page: int, npages: int) -> None:
        """SNP_PAGE_RECLAIM of small pages in a row, all or none of them."""
        for step in self._alike((page,), npages) or range(npages):
            self._ask(Command.SNP_PAGE_RECLAIM, page=page + step)
        self.rmp.freeze(page, npages, immutable=False)

    def page_unsmash(self, page: int) -> None:
        """SNP_PAGE_UNSMASH: make small pages in a row a page of 2 MiB again."""
        self._ask(Command.SNP_PAGE_UNSMASH, page=page)
        self.rmp.store(page, replace(self.rmp.raw(page), size=PageSize.SIZE_2M))

    # -- attestation ------------------------------------------------------------------------------

    def chip_id(self) -> bytes:
        """Return the 64 bytes that name this machine."""
        return hmac.new(self._secret, b"chip id", hashlib.sha512).digest()

    def report_key(self) -> bytes:
        """Return the key that signs reports; a verifier that shares it can check them."""
        return hmac.new(self._secret, b"report key", hashlib.sha384).digest()

    def guest_request(self, gctx: int, request: bytes) -> bytes:
        """SNP_GUEST_REQUEST: answer a message of a guest, 0x60 bytes of header and a payload.

        BAD_MEASUREMENT if it was not made with the key of its VMPL, INVALID_PARAM if it is out of
        sequence or of a kind that is not answered.
        """
        asked = self._ask(Command.SNP_GUEST_REQUEST, gctx=gctx)
        guest = asked.who
        message = guestmessage.open_request(request, guest.keys, guest.sequence)
        payload = guestmessage.REPORT_RESPONSE.pack(FwStatus.INVALID_PARAM, 0)
        report = guestmessage.report_request(message)
        if report is not None:
            data, vmpl = report
            raw = pack(Report.of(guest, data, vmpl, self.chip_id()), self.report_key())
            payload = guestmessage.REPORT_RESPONSE.pack(FwStatus.SUCCESS, len(raw)) + raw
        answer = Message(MessageType.REPORT_RSP, payload, message.vmpck, message.sequence + 1)
        sequence = list(guest.sequence)
        sequence[message.vmpck] = answer.sequence
        self._advance(asked, sequence=tuple(sequence))
        return answer.seal(guest.keys[message.vmpck])

    # -- small worlds -----------------------------------------------------------------------------

    def key(self) -> tuple[object, ...]:
        """Return a hashable value, equal for machines that behave alike but for made-up keys."""
        guests = tuple((gctx, guest.key()) for gctx, guest in sorted(self._guests.items()))
        return self._initialized, guests, self._asids.key(), self.rmp.key()

    def copy(self, memory: Memory | None = None) -> Firmware:
        """Return an independent copy with a table of its own, over the same or another memory."""
        other = Firmware.__new__(Firmware)
        other.__dict__.update(self.__dict__)
        other.rmp = self.rmp.copy()
        other._memory = memory or self._memory
        other._guests = dict(self._guests)
        other._asids = self._asids.copy()
        return other
