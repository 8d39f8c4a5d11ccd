# SPDX-License-Identifier: GPL-2.0-or-later
"""vCPU engines. ``api`` is what a user of an engine sees; ``unicorn_svm`` is the engine."""
