# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of Intel TDX 1.5: PAMT, Secure EPT, leaves and their status codes, as a value machine.

Start with ``module``, then ``leaves`` (the table), ``entry`` and ``pamt``. What is modelled are
rules, not cryptographic security: nothing is encrypted, and the host of a test can read all of it.
"""

from hwemu.tdx.module import TdxModule
from hwemu.tdx.result import Memory, Result
from hwemu.tdx.status import Operand, Status, TdxError

__all__ = ["Memory", "Operand", "Result", "Status", "TdxError", "TdxModule"]
