# SPDX-License-Identifier: GPL-2.0-or-later
"""The arrows of docs/architecture.md, read from the imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("privfs", "kvmsim", "hwemu")

#: What else of the checkout a package may import; the longest prefix of the importer counts.
ARROWS = {
    "hwemu": set(),
    "privfs": set(),
    "kvmsim": {"hwemu", "privfs.notifier", "privfs.leaving"},
}

#: Modules that decide and perform nothing: values in, values out.
SANS_IO = {
    "privfs.memfile", "privfs.personality", "privfs.extents", "privfs.namespace", "privfs.inode",
    "privfs.inodes", "privfs.naming", "privfs.views", "privfs.notifier.wire",
    "privfs.notifier.session", "privfs.notifier.owner", "privfs.notifier.ownerstate",
    "privfs.notifier.effects", "privfs.notifier.exclusive", "privfs.notifier.holders",
    "privfs.notifier.user",
    "privfs.operation", "privfs.budget", "privfs.seals", "privfs.filestate", "privfs.claims",
    "kvmsim.uapi", "kvmsim.uapi.encoding", "kvmsim.uapi.structs", "kvmsim.uapi.requests",
    "kvmsim.uapi.capabilities", "kvmsim.uapi.sev", "kvmsim.uapi.tdx", "kvmsim.mmu",
    "kvmsim.memslot", "kvmsim.region",
    "kvmsim.attributes", "kvmsim.device.results", "kvmsim.device.caller",
    "kvmsim.device.hypercall", "kvmsim.device.runbuffer", "kvmsim.device.dirtylog",
    "kvmsim.device.table",
    "kvmsim.invalidate", "kvmsim.fault", "kvmsim.exits", "kvmsim.vm", "kvmsim.kind",
    "kvmsim.effect", "kvmsim.level", "kvmsim.poison", "kvmsim.change", "kvmsim.memoryuse",
    "kvmsim.prefault", "kvmsim.statistics", "kvmsim.inplace", "kvmsim.hostaccess",
    "kvmsim.gpc", "kvmsim.pvclock", "kvmsim.rangeindex", "kvmsim.rangelist", "kvmsim.sortedkeys",
    "kvmsim.bracket", "kvmsim.migration", "kvmsim.script", "kvmsim.scriptvalues",
    "kvmsim.report", "kvmsim.trace", "kvmsim.vmm.prealloc",
    "kvmsim.vmm.convert", "kvmsim.vmm.bootparams", "kvmsim.vmm.elf", "kvmsim.vmm.loader",
    "kvmsim.vmm.launch", "kvmsim.vmm.vmsa", "kvmsim.vmm.bounce",
    "kvmsim.views.columns", "kvmsim.views.odd", "kvmsim.views.rows", "kvmsim.views.picture",
    "kvmsim.confidential.frames", "kvmsim.views.png", "kvmsim.views.tdx", "kvmsim.views.snp",
    "kvmsim.views.pkvm",
    "kvmsim.qemuoptions", "hwemu.stage2",
    "hwemu.leafruns", "hwemu.runs", "hwemu.tablepool", "hwemu.npt", "hwemu.tlb", "hwemu.shootdown",
    "hwemu.encryption", "hwemu.encryptedaccess", "hwemu.pkvm.state", "hwemu.pkvm.transition",
    "hwemu.pkvm.vmemmap", "hwemu.pkvm.guest", "hwemu.pkvm.engine", "hwemu.pkvm.hypervisor",
    "hwemu.pkvm.hypercall", "hwemu.pkvm.access", "hwemu.pkvm.fillable",
    "hwemu.tdx.checks", "hwemu.tdx.entry", "hwemu.tdx.fields", "hwemu.tdx.guest", "hwemu.tdx.host",
    "hwemu.tdx.leaves", "hwemu.tdx.lifeleaves", "hwemu.tdx.locks", "hwemu.tdx.machine",
    "hwemu.tdx.measure", "hwemu.tdx.memleaves", "hwemu.tdx.module", "hwemu.tdx.pamt",
    "hwemu.tdx.result", "hwemu.tdx.sept", "hwemu.tdx.states", "hwemu.tdx.status", "hwemu.tdx.td",
    "hwemu.snp.access", "hwemu.snp.asids", "hwemu.snp.check", "hwemu.snp.cpuidpage",
    "hwemu.snp.firmware", "hwemu.snp.fwrules", "hwemu.snp.fwstatus", "hwemu.snp.ghcb",
    "hwemu.snp.ghcbmsr", "hwemu.snp.guestcontext", "hwemu.snp.guestmessage",
    "hwemu.snp.guestops", "hwemu.snp.hostops", "hwemu.snp.launch", "hwemu.snp.memory",
    "hwemu.snp.outcome", "hwemu.snp.psc", "hwemu.snp.report", "hwemu.snp.rmp",
    "hwemu.snp.rmpentry", "hwemu.snp.rmpfault", "hwemu.snp.sev",
}  # fmt: skip
IMPURE = {"os", "socket", "time", "threading", "random", "trio", "pyfuse3"}

#: Who alone may import a library.
KEEPERS = {
    "pyfuse3": ("privfs.fuse",),
    "trio": (
        "privfs.notifier.link", "privfs.service", "privfs.timers", "privfs.events",
        "privfs.control", "privfs.compaction", "privfs.fuse", "privfs.cli",
    ),
    "unicorn": ("hwemu.cpu",),
    "cryptography": ("hwemu.encryption",),
    "click": ("privfs.cli", "kvmsim.cli"),
    "psutil": ("privfs.doctor", "privfs.cli"),
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            yield ".".join(parts), path


def imports(module: str, source: str, *, is_package: bool = False) -> set[str]:
    """Return what a source imports, dotted, ``from a import b`` as both a and a.b.

    Imports for type checkers alone do not count as imports of the program.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in node.orelse:
                    visit(child)
                return
            case ast.Import(names=names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    parts = module.split(".")
                    above = parts[: len(parts) - level + is_package]
                    base = ".".join(above + ([base] if base else []))
                found.add(base or "")
                found.update(f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id="__import__"), args=[ast.Constant(value=name), *_]):
                found.add(str(name))
            case ast.Call(
                func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=name), *_]
            ):
                found.add(str(name))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def under(name: str, prefixes: object) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)  # type: ignore[attr-defined]


def violations(module: str, imported: set[str]) -> list[str]:
    """Return every rule that a module with these imports breaks."""
    package = module.split(".")[0]
    broken = [
        f"{module} imports {name}: {package} may reach {sorted(ARROWS[package]) or 'nothing else'}"
        for name in imported
        if name.split(".")[0] in PACKAGES
        and not under(name, {package})
        and not under(name, ARROWS[package])
        # "from privfs import notifier" also names the package itself
        and not (any(under(other, {name}) and under(other, ARROWS[package]) for other in imported))
    ]
    if module in SANS_IO:
        broken += [f"{module} imports {name}: it may do nothing but compute"
                   for name in imported if under(name, IMPURE)]  # fmt: skip
    for library, keepers in KEEPERS.items():
        if not under(module, keepers):
            broken += [f"{module} imports {name}: only {', '.join(keepers)} may"
                       for name in imported if under(name, {library})]  # fmt: skip
    return broken


@pytest.mark.parametrize(("module", "path"), [*modules()], ids=lambda value: str(value))
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    is_package = path.name == "__init__.py"
    imported = imports(module, path.read_text(), is_package=is_package)
    assert violations(module, imported) == []


def test_every_module_that_must_be_pure_exists() -> None:
    known = {module for module, _ in modules()}
    assert sorted(SANS_IO - known) == []


def test_pure_modules_stay_pure_through_what_they_import() -> None:
    """A sans-IO module's imports inside the checkout are sans-IO too."""
    known = dict(modules())
    leaks = {
        f"{module} imports {name}"
        for module in SANS_IO
        for name in imports(module, known[module].read_text())
        if name in known and name not in SANS_IO and known[name].name != "__init__.py"
    }
    assert leaks == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hwemu.made_up", "import privfs.memfile"),
        ("hwemu.made_up", "from kvmsim import vm"),
        ("privfs.made_up", "from kvmsim.vm import Vm"),
        ("kvmsim.made_up", "from privfs import memfile"),
        ("kvmsim.made_up", "import privfs.memfile"),
        ("kvmsim.made_up", "def f():\n    from privfs.service import Service"),
        ("privfs.memfile", "import os"),
        ("privfs.memfile", "from os import path"),
        ("privfs.memfile", "import importlib\nimportlib.import_module('socket')"),
        ("privfs.memfile", "try:\n    import trio\nexcept ImportError:\n    pass"),
        ("kvmsim.fault", "import time as clock"),
        ("privfs.backing", "import pyfuse3"),
        ("privfs.backing", "from trio import Event"),
        ("kvmsim.vm", "import unicorn"),
        ("privfs.notifier.owner", "from .. import fuse\nfrom threading import Lock"),
        ("privfs.notifier.made_up", "from ...kvmsim import vm"),
    ],
)
def test_the_rules_can_be_broken(module: str, source: str) -> None:
    assert violations(module, imports(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvmsim.made_up", "from privfs.notifier.wire import Record"),
        ("kvmsim.made_up", "from privfs import notifier"),
        ("kvmsim.made_up", "import hwemu.stage2"),
        ("privfs.memfile", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import os"),
        ("privfs.fuse.made_up", "import pyfuse3, trio"),
        ("privfs.made_up", "from . import memfile"),
        ("privfs.memfile", "import oscillator"),
    ],
)
def test_the_rules_allow_what_they_should(module: str, source: str) -> None:
    assert violations(module, imports(module, source)) == []


def test_the_standard_library_is_named_rightly() -> None:
    assert IMPURE - {"trio", "pyfuse3"} <= sys.stdlib_module_names


def entered_conditions(source: str) -> set[str]:
    """Return the conditions that a source enters themselves, not by their locks."""
    tree = ast.parse(source)
    made = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("threading.Cond")
        for target in node.targets
    }
    return made & {
        ast.unparse(item.context_expr)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
    }


def test_conditions_are_entered_by_their_locks() -> None:
    """Condition.__enter__() is Python: a signal that raises in it leaves the lock taken."""
    bad = "self.more = threading.Condition(lock)\nwith self.more:\n    pass\n"
    assert entered_conditions(bad) == {"self.more"}
    entered = {name: entered_conditions(path.read_text()) for name, path in modules()}
    assert {name: found for name, found in entered.items() if found} == {}
