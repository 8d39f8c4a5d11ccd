# SPDX-License-Identifier: GPL-2.0-or-later
"""What each attack ends in on each kind, and where that is written.

Kernel files are of v6.18 unless they say otherwise; APM is AMD's manual, 24593 and 24594; *Base
spec* and *ABI* are Intel's TDX Module specifications.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kvmsim.attack.outcome import (
    KINDS,
    NONE,
    Layer,
    Outcome,
    concealed,
    noticed,
    refused,
    succeeds,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: what it ends in, why, and who says so."""

    outcome: Outcome
    why: str
    source: str


_PLAIN: Final = ("sw-protected", "shared-bit")
_BOOTED: Final = ("tdx", "snp", "pkvm", *_PLAIN)
_ACCEPTING: Final = ("tdx", "snp")

_NO_FILE = Row(NONE, "guest memory is ordinary, pinned memory: there is no private file",
               "arch/x86/kvm/svm/sev.c, sev_mem_enc_register_region()")  # fmt: skip
_NO_ACCEPT = Row(NONE, "no memory is accepted", "")
_NO_SIDES = Row(NONE, "no bit of an address says what is private", "")
_NO_HARDWARE = (
    "nothing but KVM stands between host and guest",
    "Documentation/virt/kvm/api.rst: a KVM_X86_SW_PROTECTED_VM is for development and testing",
)


def _same(kinds: tuple[str, ...], row: Row) -> dict[str, Row]:
    return dict.fromkeys(kinds, row)


def _open(what: str) -> dict[str, Row]:
    """Nobody stands against it where there is no such hardware."""
    return _same(_PLAIN, Row(succeeds(what), *_NO_HARDWARE))


_OTHER_MEMORY = concealed(Layer.KVM, "other memory")
_CIPHERTEXT = concealed(Layer.MEMORY, "ciphertext")
_MC = noticed(Layer.MEMORY, "#MC")
_RMP_NPF = refused(Layer.RMP, "#NPF(RMP)")
_PF = refused(Layer.RMP, "#PF(RMP)")
_IO = refused(Layer.IOMMU, "I/O page fault")
_SEGV = refused(Layer.EL2, "SIGSEGV")
_EPERM = refused(Layer.EL2, "EPERM")
_VE = noticed(Layer.GUEST, "#VE")
_VC = noticed(Layer.GUEST, "#VC 0x404")
_ZEROS = succeeds("zeros, where the guest had written")
_NOISE = succeeds("noise")
_OTHERS = succeeds("another page's content")

_SEV_INTEGRITY = ("encryption without integrity or freshness", "APM vol. 2, 15.34.1")
_SEV_READ = Row(_CIPHERTEXT, "encrypted with the key of the ASID", "APM vol. 2, 15.34.1")
_SEV_STAGE2 = ("the nested tables are the host's, and no table says whose a frame is",
               "APM vol. 2, 15.34.1 and 15.36.1")  # fmt: skip
_EL2_OWNER = ("the frame left the host's stage 2 when it was donated",
              "arch/arm64/kvm/hyp/nvhe/mem_protect.c, handle_host_mem_abort()")  # fmt: skip
_TDX_TAG = ("the line has a wrong tag; the TD is shut down when it consumes it",
            "Base spec, Cache Line Poisoning and Memory Integrity")  # fmt: skip
_PENDING = ("KVM's new page is PENDING: the guest is told before it can use it",
            "Base spec, Page Acceptance by the Guest TD; ABI, TDH.MEM.PAGE.AUG")  # fmt: skip
_UNVALIDATED = ("RMPUPDATE clears Validated: the guest is told before it can use the page",
                "APM vol. 2, 15.36.6")  # fmt: skip
_LIVES = Row(
    refused(Layer.EL2, "EINVAL"),
    "nothing is reclaimed from a VM that lives: it dies of it, and its page goes back zeroed",
    "mem_protect.c, __pkvm_host_reclaim_page(); pkvm.c, __pkvm_start_teardown_vm()",
)
_FRESH = (
    "a hole is filled with a new page, and nobody tells the guest",
    "virt/kvm/guest_memfd.c, kvm_gmem_punch_hole()",
)

_TABLE: Final[dict[str, dict[str, Row]]] = {
    "read-file": {
        **_same(_BOOTED, Row(refused(Layer.MOUNT, "EINVAL"), "the file has no read",
                             "guest_memfd.c, kvm_gmem_fops; docs/differences.md")),
        "sev": _NO_FILE,
    },
    "write-file": {
        **_same(_BOOTED, Row(refused(Layer.MOUNT, "EINVAL"), "the file has no write",
                             "guest_memfd.c, kvm_gmem_fops; docs/differences.md")),
        "sev": _NO_FILE,
    },
    "map-file": {
        **_same(_BOOTED, Row(refused(Layer.MOUNT, "ENODEV"), "the file has no mmap",
                             "guest_memfd.c, kvm_gmem_mmap() without GUEST_MEMFD_FLAG_MMAP")),
        "sev": _NO_FILE,
    },
    "read-hva": {
        **_same((*_ACCEPTING, *_PLAIN), Row(_OTHER_MEMORY, "userspace_addr is the shared side",
                                       "api.rst, KVM_SET_USER_MEMORY_REGION2")),
        "pkvm": Row(refused(Layer.KVM, "EFAULT"), "one page for both types, and its index is "
                    "private: a touch is SIGBUS", "guest_memfd.c, kvm_gmem_fault_user_mapping()"),
        "sev": _SEV_READ,
    },
    "bind-twice": {
        **_same(_BOOTED, Row(refused(Layer.KVM, "EINVAL"), "the pages are bound",
                             "guest_memfd.c, kvm_gmem_bind()")),
        "sev": _NO_FILE,
    },
    "bind-other": {
        **_same(("tdx", "snp", "pkvm"), Row(refused(Layer.KVM, "EINVAL"),
                "the file is another VM's", "guest_memfd.c, kvm_gmem_bind()")),
        **_same(_PLAIN, Row(succeeds("the guest's bytes"), "a file may have several users, as in "
                "the v7 series; a guest_memfd has one VM (EINVAL)",
                "v7 03/14, memfile_notifier; guest_memfd.c, kvm_gmem_bind()")),
        "sev": _NO_FILE,
    },
    "read-frame": {
        "tdx": Row(concealed(Layer.MEMORY, "zeros"), "the TD bit does not match: a fixed pattern",
                   "Base spec, Cache Line Poisoning"),
        "snp": Row(_CIPHERTEXT, "reads of the host are not checked, and have no key",
                   "APM vol. 2, 15.36.10"),
        "pkvm": Row(_SEGV, *_EL2_OWNER),
        "sev": _SEV_READ,
        **_open("the guest's bytes"),
    },
    "write-frame": {
        "tdx": Row(_MC, *_TDX_TAG),
        "snp": Row(_PF, "the page is assigned", "APM vol. 2, 15.36.10"),
        "pkvm": Row(_SEGV, *_EL2_OWNER),
        "sev": Row(_NOISE, *_SEV_INTEGRITY),
        **_open("the host's bytes"),
    },
    "replay": {
        "tdx": Row(_MC, *_TDX_TAG),
        "snp": Row(_PF, "ciphertext can be noted; to put it back is a write",
                   "APM vol. 2, 15.36.10"),
        "pkvm": Row(_SEGV, *_EL2_OWNER),
        "sev": Row(succeeds("the old content"), *_SEV_INTEGRITY),
        **_open("the old content"),
    },
    "dma-frame": {
        "tdx": Row(_MC, *_TDX_TAG),
        "snp": Row(_IO, "the IOMMU checks writes of devices against the RMP",
                   "APM vol. 2, 15.36.10; AMD IOMMU specification, SNP"),
        "pkvm": Row(_IO, "a device reaches what the host reaches",
                    "Android, kvm_iommu_host_stage2_idmap()"),
        "sev": Row(_NOISE, *_SEV_INTEGRITY),
        **_open("the host's bytes"),
    },
    "alias": {
        "tdx": Row(refused(Layer.MODULE, "PAGE_METADATA_INCORRECT"), "the PAMT has the frame as "
                   "a page of a TD", "ABI, TDH.MEM.PAGE.AUG"),
        "snp": Row(_RMP_NPF, "the RMP has another gpa for the frame",
                   "APM vol. 2, 15.36.10 Reverse-Map"),
        "pkvm": Row(_EPERM, "the host does not own the frame: nothing to donate",
                    "mem_protect.c, __pkvm_host_donate_guest()"),
        "sev": Row(succeeds("the page at both gpas"), *_SEV_STAGE2),
        **_open("the page at both gpas"),
    },
    "claim": {
        "tdx": Row(refused(Layer.MODULE, "PAGE_METADATA_INCORRECT"), "the PAMT has the frame as "
                   "the first TD's", "ABI, TDH.MEM.PAGE.AUG"),
        "snp": Row(_RMP_NPF, "the RMP has another ASID for the frame",
                   "APM vol. 2, 15.36.10 Guest-Owned"),
        "pkvm": Row(_EPERM, "the host does not own the frame: nothing to donate",
                    "mem_protect.c, __pkvm_host_donate_guest()"),
        "sev": Row(concealed(Layer.MEMORY, "noise"), "another ASID has another key",
                   "APM vol. 2, 15.34.1"),
        **_open("the guest's bytes"),
    },
    "other-side": {
        "tdx": Row(concealed(Layer.MEMORY, "zeros"), "a shared access has no key of the TD's",
                   "Base spec, Shared EPT and Cache Line Poisoning"),
        "snp": Row(_CIPHERTEXT, "a read with C-bit 0 has no key, a write is #NPF(RMP)",
                   "APM vol. 2, table 15-39"),
        "pkvm": _NO_SIDES,
        "sev": _SEV_READ,
        "sw-protected": _NO_SIDES,
        "shared-bit": Row(succeeds("the private page as a shared one"), *_NO_HARDWARE),
    },
    "split": {
        "tdx": Row(refused(Layer.MODULE, "GPA_RANGE_NOT_BLOCKED"), "vCPUs may have it in a TLB: "
                   "block and track first", "ABI, TDH.MEM.PAGE.DEMOTE"),
        "snp": Row(refused(Layer.RMP, "FAIL_OVERLAP"), "a page of 2 MiB lies there: PSMASH first, "
                   "which keeps Validated", "APM vol. 3, RMPUPDATE"),
        "pkvm": Row(refused(Layer.EL2, "EINVAL"), "pages come back from a VM that is torn down",
                    "mem_protect.c, __pkvm_host_reclaim_page()"),
        "sev": Row(_OTHERS, *_SEV_STAGE2),
        **_open("another page's content"),
    },
    "accept-again": {
        "tdx": Row(refused(Layer.MODULE, "PAGE_ALREADY_ACCEPTED"), "it is MAPPED: nothing is done",
                   "ABI, TDG.MEM.PAGE.ACCEPT"),
        "snp": Row(refused(Layer.RMP, "CF = 1"), "PVALIDATE says that nothing changed",
                   "APM vol. 3, PVALIDATE"),
        **_same(("pkvm", "sev", *_PLAIN), _NO_ACCEPT),
    },
    "convert-dma": {
        **_same(_ACCEPTING, Row(_OTHER_MEMORY, "the device stores to the shared side",
                                "api.rst, KVM_SET_USER_MEMORY_REGION2")),
        "pkvm": Row(refused(Layer.KVM, "EFAULT"), "the index is private when the device comes: its "
                    "reference is refused", "guest_memfd.c, kvm_gmem_fault_user_mapping()"),
        "sev": Row(_NOISE, *_SEV_INTEGRITY),
        **_same(_PLAIN, Row(refused(Layer.KVM, "EINVAL"), "the buffers lie in memory that has no "
                            "private side", "QEMU, kvm_convert_memory()")),
    },
    "wrong-bit": {
        "tdx": Row(_VE, "the shared side has other bytes; the implicit conversion took the page, "
                   "and its next one is PENDING", _PENDING[1]),
        "snp": Row(_VC, "the shared side has other bytes; the implicit conversion took the page, "
                   "and its next one is not validated", _UNVALIDATED[1]),
        "pkvm": _NO_SIDES,
        "sev": _SEV_READ,
        "sw-protected": _NO_SIDES,
        "shared-bit": Row(_ZEROS, "the implicit conversion took the page, and nobody tells the "
                          "guest", _FRESH[1]),
    },
    "convert": {
        "tdx": Row(_VE, *_PENDING),
        "snp": Row(_VC, *_UNVALIDATED),
        "pkvm": Row(refused(Layer.EL2, "EFAULT"), "the type in the file changes, the hypervisor's "
                    "page state does not: only the guest shares", _EL2_OWNER[1]),
        "sev": _NO_FILE,
        "sw-protected": Row(succeeds("the host's bytes"), "the type of an access is KVM's to say",
                            _NO_HARDWARE[1]),
        "shared-bit": Row(_ZEROS, *_FRESH),
    },
    "punch-refill": {
        "tdx": Row(_VE, *_PENDING),
        "snp": Row(_VC, *_UNVALIDATED),
        "pkvm": _LIVES,
        "sev": Row(_NOISE, *_SEV_INTEGRITY),
        **_same(_PLAIN, Row(_ZEROS, *_FRESH)),
    },
    "punch-part": {
        "tdx": Row(_VE, "the page of 2 MiB was demoted; its other pages stay accepted",
                   "ABI, TDH.MEM.PAGE.DEMOTE and TDH.MEM.PAGE.REMOVE"),
        "snp": Row(_VC, "the page of 2 MiB was smashed; its other pages stay validated",
                   "APM vol. 3, PSMASH; vol. 2, 15.36.6"),
        "pkvm": _LIVES,
        "sev": _NO_FILE,
        **_same(_PLAIN, Row(_ZEROS, *_FRESH)),
    },
    "remap": {
        "tdx": Row(_VE, *_PENDING),
        "snp": Row(_VC, *_UNVALIDATED),
        "pkvm": Row(_EPERM, "the guest has a page at that gfn",
                    "mem_protect.c, __pkvm_host_donate_guest()"),
        "sev": Row(_OTHERS, *_SEV_STAGE2),
        **_open("another page's content"),
    },
    "accept-twice": {
        "tdx": Row(noticed(Layer.GUEST, "accepted before: lost"), "a guest remembers what it has "
                   "accepted, and takes no second page silently",
                   "Base spec, Page Acceptance by the Guest TD"),
        "snp": Row(noticed(Layer.GUEST, "accepted before: lost"), "a guest remembers what it has "
                   "validated: the RMP alone would not see two frames for one gpa",
                   "APM vol. 2, 15.36.6; SEV-SNP white paper, Page Validation"),
        **_same(("pkvm", "sev", *_PLAIN), _NO_ACCEPT),
    },
    "hung-vmm": {
        **_same(_BOOTED, Row(refused(Layer.MOUNT, "SIGKILL"), "who does not acknowledge is killed; "
                             "its death is the proof", "docs/protocol.md")),
        "sev": _NO_FILE,
    },
    "tampered-image": {
        "tdx": Row(noticed(Layer.OWNER, "another measurement"), "MRTD is over every page that was "
                   "added", "Base spec, Measurement and Attestation"),
        "snp": Row(noticed(Layer.OWNER, "another measurement"), "the launch digest is over every "
                   "page that was added", "SEV-SNP firmware ABI (56860), 8.17.2"),
        "sev": Row(noticed(Layer.OWNER, "another measurement"), "LAUNCH_MEASURE",
                   "SEV API (55766), LAUNCH_MEASURE"),
        "pkvm": Row(succeeds("nothing is measured"), "EL2 measures nothing; a guest firmware that "
                    "checks what is loaded (pvmfw) is Android's",
                    "Documentation/virt/kvm/arm/pkvm.rst"),
        **_same(_PLAIN, Row(succeeds("nothing is measured"), *_NO_HARDWARE)),
    },
}  # fmt: skip
TABLE: Final[Mapping[str, Mapping[str, Row]]] = MappingProxyType(
    {name: MappingProxyType({kind: rows[kind] for kind in KINDS}) for name, rows in _TABLE.items()}
)


def expected(name: str, kind: str) -> Row:
    """The cell of an attack on a kind; KeyError for one that the table does not know."""
    return TABLE[name][kind]
