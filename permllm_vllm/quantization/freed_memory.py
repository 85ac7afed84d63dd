"""Gives memory that loading has freed back to the operating system."""

import ctypes


def release_freed_memory() -> None:
    """Ask the allocator of the C library, where it can: glibc keeps freed pages for itself.

    After a checkpoint's tensors were packed and dropped these are hundreds of MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
