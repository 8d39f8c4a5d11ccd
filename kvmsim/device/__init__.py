# SPDX-License-Identifier: GPL-2.0-or-later
"""``/dev/kvm`` as objects: the system, its VMs and their vCPUs, each with one ``ioctl`` entry.

``ioctl(request, argument, caller)`` takes the two words of ioctl(2) and whoever made the call, and
answers with a :data:`~kvmsim.device.results.Result`.  Nothing here knows how the call arrived.
"""
