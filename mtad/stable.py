"""Stable storage: what was flushed is there after a power cut, or `OSError` is raised.

What it is for: the promises of the spool and of a Maildir stand on fsync(2), and on its word being true. On XFS it is not
in one case: a file system that has shut itself down, as it does when its log cannot be written, answers 0 to an fsync of a
directory although the rename that was to be flushed is lost, and may answer 0 to an fsync of a file that is under way at
that moment (Linux 6.18). But every stat of it fails from then on, so each flush here ends with one, which costs less than
a microsecond.

Errors: OSError; what was to be flushed must then not be relied upon, whatever a later flush says.
"""

from __future__ import annotations

import os


def flush(fd: int) -> None:
    """Make a file, or the entries of a directory, durable."""
    os.fsync(fd)
    os.fstat(fd)


def flush_data(fd: int) -> None:
    """Make the content of a file durable, and its size."""
    os.fdatasync(fd)
    os.fstat(fd)
