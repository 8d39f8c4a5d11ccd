# SPDX-License-Identifier: GPL-2.0-or-later
"""``kvmsim exec``: an unmodified program whose KVM ioctls this process answers.

A seccomp filter stops the program at every ioctl of KVM's type and at nothing else; the listener
of the filter is here (seccomp_unotify(2)).  Whatever else the program does is between it and the
kernel.
"""
