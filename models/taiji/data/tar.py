"""Tar files as webdataset lays them out, with every byte fixed: no times, owners or modes.

Members are known by their byte offsets, so that one sample is read with one seek, and a file that
a killed process left behind is continued where its last whole member ends.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
END = tarfile.NUL * (2 * BLOCK)


@dataclass(frozen=True)
class Member:
    """One file in a tar: its header starts at `start`, its bytes at `data`."""

    name: str
    start: int
    data: int
    size: int

    @property
    def end(self) -> int:
        return self.data + -(-self.size // BLOCK) * BLOCK

    def read(self, handle: BinaryIO) -> bytes:
        handle.seek(self.data)
        return handle.read(self.size)


def tar_bytes(key: str, files: Mapping[str, bytes]) -> bytes:
    """One sample: a member `key.suffix` for each file, in the given order."""
    blocks = []
    for suffix, content in files.items():
        header = tarfile.TarInfo(f"{key}.{suffix}")
        header.size, header.mode, header.mtime = len(content), 0o444, 0
        padding = tarfile.NUL * (-len(content) % BLOCK)
        blocks += [header.tobuf(tarfile.USTAR_FORMAT), content, padding]
    return b"".join(blocks)


def members(path: Path) -> Iterator[Member]:
    """The whole regular members from the start.

    Raises:
        ValueError: after them, where the file is cut or damaged.
    """
    size = path.stat().st_size
    if not size:
        return
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                member = Member(entry.name, entry.offset, entry.offset_data, entry.size)
                end = member.end
                if end > size:
                    raise ValueError(f"{path.name} is cut inside {entry.name}")
                if entry.isreg():
                    yield member
    except tarfile.TarError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    with path.open("rb") as handle:  # tarfile takes a damaged header for the end
        handle.seek(end)
        if handle.read(BLOCK).strip(tarfile.NUL):
            raise ValueError(f"{path.name} is damaged after {end} bytes")
