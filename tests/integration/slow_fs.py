# SPDX-License-Identifier: GPL-2.0-or-later
"""A file system that answers when it is told to: ``slow_fs.py DIRECTORY``.

Its root has one extended attribute, ``user.slow``, of 64 times ``s``.  It prints ``ready``, then
``asked`` for each getxattr(2); the line ``answer`` answers them all, the end of input unmounts.
Who is killed in such a call cannot exit before the answer: the request has been sent.
"""

from __future__ import annotations

import stat
import sys

import pyfuse3
import trio

VALUE = b"s" * 64


class SlowFs(pyfuse3.Operations):
    """A root and nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = trio.Event()

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755
        return entry

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        print("asked", flush=True)
        await self.answer.wait()
        return VALUE


async def serve(fs: SlowFs) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("ready", flush=True)
        async for line in trio.wrap_file(sys.stdin):
            if line == "answer\n":
                fs.answer.set()
        fs.answer.set()
        pyfuse3.terminate()


def main() -> int:
    fs = SlowFs()
    pyfuse3.init(fs, sys.argv[1], {*pyfuse3.default_options, "fsname=slow"})
    try:
        trio.run(serve, fs)
    finally:
        pyfuse3.close(unmount=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
