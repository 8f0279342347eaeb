"""libnwfilter, loaded by cffi with the declarations of its header."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional

from cffi import FFI

#: The version of the interface that this package is written for.
ABI_VERSION = 1


def declarations(header: str) -> str:
    """What cffi reads of the header: no comments, and of what the preprocessor decides the side of C before C23."""
    header = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)
    kept, conditions = [], []
    for line in header.splitlines():
        words = line.split()
        if line.startswith(("#if", "#ifdef", "#ifndef")):
            # Only the include guard and the absence of C++ hold.
            conditions.append(words[0] == "#ifndef")
        elif line.startswith("#else"):
            conditions[-1] = not conditions[-1]
        elif line.startswith("#endif"):
            conditions.pop()
        elif all(conditions):
            is_number = len(words) == 3 and words[0] == "#define" and words[2].isdigit()
            if not line.startswith("#") or is_number:
                kept.append(line)
    return "\n".join(kept)


ffi = FFI()
ffi.cdef(declarations(Path(__file__).with_name("nwfilter.h").read_text(encoding="utf-8")))
# NWFILTER_LIBRARY is for libraries that are not installed.
lib: Any = ffi.dlopen(os.environ.get("NWFILTER_LIBRARY", f"libnwfilter.so.{ABI_VERSION}"))
if lib.nwf_abi_version() != ABI_VERSION:
    raise ImportError(f"libnwfilter has version {lib.nwf_abi_version()} of the interface, not {ABI_VERSION}")


def version() -> str:
    """The version of the loaded library."""
    return ffi.string(lib.nwf_version()).decode()


def encoded(text: Optional[str]) -> tuple[Any, int]:
    """A text as the library takes it: a pointer, which the caller keeps during the call, and its bytes."""
    if text is None:
        return ffi.NULL, 0
    data = text.encode()
    return ffi.from_buffer(data), len(data)


def decoded(pointer: Any, length: int) -> str:
    """A text that the library hands out."""
    return "" if pointer == ffi.NULL else ffi.buffer(pointer, length)[:].decode()


def taken(text: Any) -> str:
    """The text of a handle, which is freed."""
    length = ffi.new("size_t *")
    try:
        data = lib.nwf_text_data(text, length)
        return decoded(data, length[0])
    finally:
        lib.nwf_text_free(text)


class Handle:
    """An object of the library, which is freed once."""

    def __init__(self, pointer: Any, free: Any) -> None:
        self._pointer = ffi.gc(pointer, free)

    @property
    def pointer(self) -> Any:
        """The pointer, as long as the object is not closed."""
        if self._pointer is None:
            raise ValueError(f"the {type(self).__name__} is closed")
        return self._pointer

    def close(self) -> None:
        """Frees what belongs to the library. The object cannot be used any more. To close it again does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
