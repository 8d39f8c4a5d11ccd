# SPDX-License-Identifier: GPL-2.0-or-later
"""What every table says of a VM's pages, in words and ranges: ``kvmsim map``.

``columns`` are the values, an element a page, copied in pieces so that no lock is held for long;
``tdx``, ``snp`` and ``pkvm`` copy what a technology has beside the second stage; ``odd`` are the
marks; ``rows`` makes ranges of what is alike; ``gather`` does all that for a running VM; and
``picture`` draws it, a pixel or a block a page.
"""
