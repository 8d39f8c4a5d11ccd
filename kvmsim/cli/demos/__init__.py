# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``kvmsim demo`` shows: one guest of each kind from launch to teardown, every claim checked.

``stage`` prints, ``kinds`` has what differs between the kinds, ``calls`` counts what their hardware
is asked, ``talk`` is the guest's console, ``play`` has the steps, ``look`` and ``attest`` parts of
them.
"""
