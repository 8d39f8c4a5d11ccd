# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory side: a mount whose files are guest-private memory.

Start with ``memfile`` (one private file as a value machine), then ``notifier``
(the contract with the users of the memory), then ``fuse`` (the shell around both).
"""
