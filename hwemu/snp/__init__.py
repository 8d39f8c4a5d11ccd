# SPDX-License-Identifier: GPL-2.0-or-later
"""AMD SEV-SNP as rules: who may reach which physical page, and who may change that.

Start with ``rmp`` (the reverse map table) and ``rmpentry`` (what an entry says); ``hostops`` and
``guestops`` are the instructions that change it, ``access`` what every access meets, ``firmware``
the commands of the AMD-SP, ``ghcb*`` and ``psc`` how a guest asks its hypervisor, ``sev`` the
older sibling without integrity.

Rules are tables of `hwemu.snp.check.Check` in the order in which they are asked; whatever is
refused changes nothing.  Encryption is modelled as *who sees ciphertext*, not performed.
"""
