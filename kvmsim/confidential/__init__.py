# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM's side of confidential hardware: how launches, faults, conversions and teardown use it.

``platform`` is the hardware that one emulator process has; ``base`` what each technology must be
to an emulator; ``tdx``, ``snp`` and ``pkvm`` are to it what arch/x86/kvm/vmx/tdx.c,
arch/x86/kvm/svm/sev.c and arch/arm64/kvm/pkvm.c are to KVM. The rules themselves are hwemu's.
"""
