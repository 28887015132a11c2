"""A plugin for nbdkit: a disk in a file, and a log of each write and each flush of it. `tools.lib.crash_blocks` runs it.

It runs in the Python of nbdkit, and uses nothing of ours. ``image=`` and ``log=`` are its parameters, both files that
exist. A record of the log is one letter, the offset (8 octets) and the length (4) in little-endian order, and with W the
octets.
"""

import os
import struct

API_VERSION = 2

_RECORD = struct.Struct("<cQI")
_parameters: dict[str, str] = {}
_files: dict[str, int] = {}


def config(key: str, value: str) -> None:
    _parameters[key] = value


def get_ready() -> None:
    _files["image"] = os.open(_parameters["image"], os.O_RDWR)
    _files["log"] = os.open(_parameters["log"], os.O_WRONLY | os.O_APPEND)


def open(readonly: bool) -> int:  # noqa: A001, ARG001
    return 1


def get_size(_handle: int) -> int:
    return os.fstat(_files["image"]).st_size


def can_write(_handle: int) -> bool:
    return True


def can_flush(_handle: int) -> bool:
    return True


def pread(_handle: int, buffer: bytearray, offset: int, _flags: int) -> None:
    os.preadv(_files["image"], [buffer], offset)


def pwrite(_handle: int, buffer: bytes, offset: int, _flags: int) -> None:
    os.writev(_files["log"], [_RECORD.pack(b"W", offset, len(buffer)), buffer])
    os.pwrite(_files["image"], buffer, offset)


def flush(_handle: int, _flags: int) -> None:
    os.write(_files["log"], _RECORD.pack(b"F", 0, 0))
