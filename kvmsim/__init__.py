# SPDX-License-Identifier: GPL-2.0-or-later
"""The KVM side: memslots with private fds, attributes, faults with retry, exits.

Start with ``uapi`` (names and numbers), then ``memslot``, ``attributes`` and ``fault``.
"""
