# SPDX-License-Identifier: GPL-2.0-or-later
"""What a machine may refuse to ``kvmsim exec``, in one line that says what would mend it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final


class Refused(Exception):
    """The program cannot run here; ``str()`` is the line for the person."""


#: seccomp(2) with NEW_LISTENER and WAIT_KILLABLE_RECV.
_FILTER: Final = {
    errno.EBUSY: "Linux allows one seccomp listener above a process, and there is one already: "
    "another kvmsim exec, or the supervisor of a container",
    errno.EINVAL: "this kernel's seccomp has no listeners that wait killably: needs Linux 5.19",
    errno.ENOSYS: "this kernel has no seccomp filters: needs CONFIG_SECCOMP_FILTER",
}
_FILTER_FORBIDDEN: Final = (
    "seccomp(2) is forbidden here, as a container's own filter may do: "
    "let it (docker run --security-opt seccomp=unconfined), or run outside"
)

#: Switches that keep user namespaces from ordinary users, and the value that does.
_NAMESPACE_SWITCHES: Final = (
    ("user.max_user_namespaces", "0"),
    ("kernel.unprivileged_userns_clone", "0"),  # Debian's and Ubuntu's kernels
    ("kernel.apparmor_restrict_unprivileged_userns", "1"),  # Ubuntu 23.10
)
_PTRACE_SWITCH: Final = "kernel.yama.ptrace_scope"  # Documentation/admin-guide/LSM/Yama.rst


def no_filter(error: OSError) -> Refused:
    """The filter could not be installed."""
    return Refused(f"{_FILTER.get(error.errno or 0, _FILTER_FORBIDDEN)} ({error.strerror})")


def no_namespace(error: OSError, uid: int) -> Refused:
    """/dev/kvm could not be covered: a mount namespace, for ordinary users in a user namespace."""
    what = f"no namespace in which /dev/kvm is the simulated one: {error.strerror}"
    if uid == 0:
        return Refused(
            f"{what}; root needs CAP_SYS_ADMIN for it (docker run --privileged, or --cap-add "
            "SYS_ADMIN and --security-opt seccomp=unconfined apparmor=unconfined)"
        )
    switches = [f"{name}={value}" for name, value in _NAMESPACE_SWITCHES if _sysctl(name) == value]
    because = f" (sysctl {', '.join(switches)})" if switches else ""
    return Refused(f"{what}; ordinary users may make none here{because}: allow it, or run as root")


def no_access(error: OSError) -> Refused:
    """The program's memory and descriptors are out of reach: PTRACE_MODE_ATTACH of ptrace(2)."""
    scope = _sysctl(_PTRACE_SWITCH)
    because = f" (sysctl {_PTRACE_SWITCH}={scope})" if scope in ("2", "3") else ""
    return Refused(
        f"the program's memory and descriptors cannot be reached: {error.strerror}; ptrace(2), "
        f"process_vm_readv(2) and pidfd_getfd(2) must be allowed{because}: {_PTRACE_SWITCH} below "
        "2, in a container CAP_SYS_PTRACE"
    )


def _sysctl(name: str) -> str:
    path = Path("/proc/sys", *name.split("."))
    return path.read_text().strip() if os.access(path, os.R_OK) else ""
