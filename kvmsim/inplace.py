# SPDX-License-Identifier: GPL-2.0-or-later
"""Conversion in place: one page for both types, and the file says which type an index has.

KVM_SET_MEMORY_ATTRIBUTES2 on the file and its rules are those of the series "guest_memfd: In-place
conversion support" (RFC v4 and v5, 2026; virt/kvm/guest_memfd.c and arch/x86/kvm/x86.c there):

* every index of the file has a type, allocated or not, from the file's creation on; punching it
  does not change it;
* to private only without references of the host: else EAGAIN, with the offset of the first;
* the caller says what becomes of contents: zeroed, preserved, or no promise. It applies to
  allocated pages, also where the type is not changed.

The host reaches shared indices by a :class:`HostAccess`, whose open accesses are the references.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Self

from kvmsim.attributes import Attributes
from kvmsim.kind import Contents, VmKind
from kvmsim.uapi import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE,
    KVM_SET_MEMORY_ATTRIBUTES2_ZERO,
    MEMORY_ATTRIBUTES2,
    PAGE_SHIFT,
    PAGE_SIZE,
    U64,
    KvmError,
)

if TYPE_CHECKING:
    from kvmsim.region import PrivateFile

_OPERATION: Final = "KVM_SET_MEMORY_ATTRIBUTES2"
_PRIVATE: Final = KVM_MEMORY_ATTRIBUTE_PRIVATE
_ZERO: Final = KVM_SET_MEMORY_ATTRIBUTES2_ZERO
_PRESERVE: Final = KVM_SET_MEMORY_ATTRIBUTES2_PRESERVE


class Fill(Enum):
    """What has to be written to the allocated pages of a range before a conversion ends."""

    KEEP = "nothing"
    ZERO = "zeros"
    SCRAMBLE = "noise"
    """So that nobody comes to rely on what was not promised."""


class ConversionError(KvmError):
    """A conversion refused; nothing was changed. ``error_offset`` is where, in bytes."""

    def __init__(self, number: int, reason: str, request: Attributes2, error_offset: int) -> None:
        super().__init__(number, _OPERATION, reason, start=request.offset, size=request.size)
        self.error_offset = error_offset
        name = errno.errorcode.get(number, str(number))
        self.args = (
            f"{_OPERATION} file offset {request.offset:#x}+{request.size:#x}: {name} at "
            f"{error_offset:#x}: {reason}",
        )


@dataclass(frozen=True, slots=True)
class Attributes2:
    """struct kvm_memory_attributes2 as an input, in bytes of the file."""

    offset: int
    size: int
    attributes: int
    flags: int = 0
    reserved: tuple[int, ...] = (0,) * 11

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode 128 bytes."""
        offset, size, attributes, flags, _, *reserved = MEMORY_ATTRIBUTES2.unpack(data)
        return cls(offset, size, attributes, flags, tuple(reserved))

    def to_bytes(self, error_offset: int = 0) -> bytes:
        """Encode, with what the kernel says of an error."""
        return MEMORY_ATTRIBUTES2.pack(
            self.offset, self.size, self.attributes, self.flags, error_offset, *self.reserved
        )

    @property
    def pages(self) -> tuple[int, int]:
        """The indices [start, end)."""
        return self.offset >> PAGE_SHIFT, (self.offset + self.size) >> PAGE_SHIFT

    @property
    def private(self) -> bool:
        """Whether it asks for private memory."""
        return bool(self.attributes & _PRIVATE)


@dataclass(frozen=True, slots=True)
class ConvertFile:
    """Indices [start, end) of ``file`` get attributes ``value``; first their pages are filled."""

    file: int
    start: int
    end: int
    value: int
    fill: Fill


# --- the file -----------------------------------------------------------------------------------


class InPlaceFile:
    """The types of a file's indices, and who of the host is at them."""

    __slots__ = ("_next", "_references", "attributes", "converting", "npages")

    def __init__(self, npages: int, *, shared: bool) -> None:
        self.npages = npages
        self.attributes = Attributes()
        if not shared:
            self.attributes.set(0, npages, _PRIVATE)
        self.converting: tuple[int, int] | None = None
        self._references: dict[int, tuple[int, int]] = {}
        self._next = 0

    @classmethod
    def of(cls, file: PrivateFile) -> Self:
        """A file as it is created: private, but for GUEST_MEMFD_FLAG_INIT_SHARED."""
        return cls(file.npages, shared=bool(file.flags & GUEST_MEMFD_FLAG_INIT_SHARED))

    def is_private(self, page: int) -> bool:
        """The type of one index; beyond the end everything is shared."""
        return bool(self.attributes.get(page) & _PRIVATE)

    def refer(self, start: int, end: int) -> int:
        """The host has pages [start, end) in hand; the reference's number."""
        self._next += 1
        self._references[self._next] = (start, end)
        return self._next

    def widen(self, reference: int, end: int) -> bool:
        """The host has the pages up to ``end`` as well; False: it was severed."""
        held = self._references.get(reference)
        if held is not None:
            self._references[reference] = (held[0], end)
        return held is not None

    def release(self, reference: int) -> None:
        """And no longer; one that was severed is gone already."""
        self._references.pop(reference, None)

    def holds(self, reference: int) -> bool:
        """Whether a reference was neither released nor severed."""
        return reference in self._references

    def sever(self, start: int, end: int) -> None:
        """Take away every reference to any of pages [start, end): their memory goes to others.

        The kernel lets a pin keep a page that was truncated; here nobody may, since the pages
        are the owner's to give away once this invalidation is acknowledged.
        """
        gone = [
            reference
            for reference, (first, last) in self._references.items()
            if first < end and start < last
        ]
        for reference in gone:
            del self._references[reference]

    def first_reference(self, start: int, end: int) -> int | None:
        """The lowest page of [start, end) that the host has in hand."""
        held = [
            max(first, start)
            for first, last in self._references.values()
            if first < end and start < last
        ]
        return min(held, default=None)

    def is_converting(self, start: int, end: int) -> bool:
        """Whether a conversion of any of [start, end) was begun and not ended."""
        return self.converting is not None and (
            self.converting[0] < end and start < self.converting[1]
        )

    def key(self) -> Hashable:
        """The whole state as a hashable value; references count by where they are."""
        held = tuple(sorted(self._references.values()))
        return (self.npages, self.attributes.key(), self.converting, held)

    def copy(self) -> Self:
        """An independent twin, in which references have the same numbers."""
        twin = type(self)(self.npages, shared=True)
        twin.attributes = self.attributes.copy()
        twin.converting = self.converting
        twin._references = self._references.copy()
        twin._next = self._next
        return twin


# --- the ioctl's checks -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Question:
    request: Attributes2
    file: InPlaceFile | None
    kind: VmKind
    launched: bool


def content_modes(kind: VmKind, *, private: bool, launched: bool) -> int:
    """KVM_SET_MEMORY_ATTRIBUTES2_* that a conversion in this direction can keep.

    kvm_arch_gmem_supported_content_modes(). Nobody promises a guest zeros that it can only get by
    trusting the host.
    """
    return _MODES[kind.contents](private, launched)


_MODES: Final[Mapping[Contents, Callable[[bool, bool], int]]] = {
    Contents.COMMON: lambda private, launched: _PRESERVE if private else _ZERO | _PRESERVE,
    # What is encrypted for the guest, or was, is noise to the other: only what the host loads
    # before the guest is finalized goes in as it is, as the measured image.
    Contents.ENCRYPTED: lambda private, launched: (
        (0 if launched else _PRESERVE) if private else _ZERO
    ),
    # Only who owns the page changes (__pkvm_guest_share_host(), __pkvm_guest_unshare_host()).
    Contents.OWNED: lambda private, launched: _PRESERVE,
}

_UNSPECIFIED: Final[Mapping[Contents, Fill]] = {
    Contents.COMMON: Fill.SCRAMBLE,
    Contents.ENCRYPTED: Fill.KEEP,
    Contents.OWNED: Fill.KEEP,
}

# kvm_gmem_set_attributes(); all of these are refused with error_offset = offset.
_CHECKS: Final[tuple[tuple[int, str, Callable[[_Question], object]], ...]] = (
    (errno.ENOTTY, "types are the VM's here and not the file's", lambda q: q.file is None),
    (errno.EINVAL, "unknown flag", lambda q: q.request.flags & ~(_ZERO | _PRESERVE)),
    (errno.EINVAL, "more than one mode", lambda q: q.request.flags == _ZERO | _PRESERVE),
    (errno.EINVAL, "reserved must be 0", lambda q: any(q.request.reserved)),
    (
        errno.EINVAL,
        "an attribute is not supported",
        lambda q: q.request.attributes & ~(_PRIVATE if q.kind.private_memory else 0),
    ),
    (errno.EINVAL, "size is 0", lambda q: q.request.size == 0),
    (errno.EINVAL, "offset + size wraps", lambda q: q.request.offset + q.request.size >= U64),
    (errno.EINVAL, "offset is not page-aligned", lambda q: q.request.offset % PAGE_SIZE),
    (errno.EINVAL, "size is not page-aligned", lambda q: q.request.size % PAGE_SIZE),
    (
        errno.EINVAL,
        "range is outside the file",
        lambda q: q.file is not None and q.request.pages[1] > q.file.npages,
    ),
    (
        errno.EOPNOTSUPP,
        "this mode cannot be kept for this kind of VM and direction",
        lambda q: (
            q.request.flags & ~content_modes(q.kind, private=q.request.private, launched=q.launched)
        ),
    ),
)


def plan_conversion(
    number: int, file: InPlaceFile | None, request: Attributes2, kind: VmKind, *, launched: bool
) -> ConvertFile:
    """What ``request`` would do to file ``number``; ConversionError if it is refused.

    ``file`` is None where the VM keeps the types. ``launched``: the guest is finalized.
    """
    question = _Question(request, file, kind, launched)
    for code, reason, refused in _CHECKS:
        if refused(question):
            raise ConversionError(code, reason, request, request.offset)
    assert file is not None
    start, end = request.pages
    if request.private and not _is_uniform(file, start, end, _PRIVATE):
        held = file.first_reference(start, end)
        if held is not None:
            raise ConversionError(
                errno.EAGAIN, "the host has a reference to the page", request, held << PAGE_SHIFT
            )
    fill = _FILLS.get(request.flags) or _UNSPECIFIED[kind.contents]
    return ConvertFile(number, start, end, request.attributes, fill)


def changes_types(file: InPlaceFile, conversion: ConvertFile) -> bool:
    """Whether any index has another type than it shall have."""
    return not _is_uniform(file, conversion.start, conversion.end, conversion.value)


def _is_uniform(file: InPlaceFile, start: int, end: int, value: int) -> bool:
    run = file.attributes.run(start)
    return run.value == value and end <= run.end


_FILLS: Final[Mapping[int, Fill]] = {_ZERO: Fill.ZERO, _PRESERVE: Fill.KEEP}
