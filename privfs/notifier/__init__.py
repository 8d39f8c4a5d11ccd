# SPDX-License-Identifier: GPL-2.0-or-later
"""The contract between the owner of private files and their users, across processes.

``wire`` is the record format, ``owner`` (with ``session``) and ``user`` are the two halves of the
protocol, all sans-IO; ``link`` performs their effects on sockets.
"""
