"""What fails, as exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional

from ._library import decoded, ffi, lib


@dataclass(frozen=True)
class Place:
    """Where the text is that an error is about. A column of 0 is not known."""

    document: str
    line: int
    column: int
    length: int

    def __str__(self) -> str:
        return f"{self.document}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True)
class Diagnostic:
    """A problem of a document."""

    code: str
    is_error: bool
    line: int
    column: int
    length: int
    message: str
    help: Optional[str]


class Error(Exception):
    """Why a call failed. Nothing has changed."""

    #: The name of the code, such as "NWF_NO_SUCH_FILTER".
    code: str
    #: What went wrong, without its causes.
    message: str
    #: The cause of the message, the cause of that, and so on.
    causes: tuple[str, ...]
    #: Where the text is that it is about.
    place: Optional[Place]
    #: Every problem of a document.
    diagnostics: tuple[Diagnostic, ...]

    def __init__(self, code: str, message: str, causes: tuple[str, ...] = ()) -> None:
        super().__init__(": ".join((message, *causes)))
        self.code, self.message, self.causes = code, message, causes
        self.place, self.diagnostics = None, ()


class InvalidDocument(Error):
    """A document is not valid."""


class NoSuchFilter(Error):
    """No filter has that name."""


class FilterInUse(Error):
    """Ports use the filter."""


class NoSuchSet(Error):
    """No set has that name."""


class SetInUse(Error):
    """Filters, other sets or ports use the set."""


class NoSuchBinding(Error):
    """The port has no binding."""


class BindingExists(Error):
    """The port has a binding already."""


class NoSuchPort(Error):
    """There is no such network interface."""


class Refused(Error):
    """The kernel refused a rule or a set."""


class Forked(Error):
    """The object was made before a fork: a child opens its own driver."""


_CLASSES: dict[int, type[Error]] = {
    lib.NWF_INVALID_DOCUMENT: InvalidDocument,
    lib.NWF_NO_SUCH_FILTER: NoSuchFilter,
    lib.NWF_FILTER_IN_USE: FilterInUse,
    lib.NWF_NO_SUCH_SET: NoSuchSet,
    lib.NWF_SET_IN_USE: SetInUse,
    lib.NWF_NO_SUCH_BINDING: NoSuchBinding,
    lib.NWF_BINDING_EXISTS: BindingExists,
    lib.NWF_NO_SUCH_PORT: NoSuchPort,
    lib.NWF_REFUSED: Refused,
    lib.NWF_FORKED: Forked,
}


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Calls a function whose last argument is an error, and raises that."""
    error = ffi.new("nwf_error **")
    code = function(*arguments, error)
    if code != lib.NWF_OK:
        handle = error[0]
        try:
            raise _raised(code, handle)
        finally:
            lib.nwf_error_free(handle)


def _raised(code: int, handle: Any) -> Error:
    length = ffi.new("size_t *")
    message = decoded(lib.nwf_error_message(handle, length), length[0])
    causes = []
    for number in range(lib.nwf_error_cause_count(handle)):
        cause = lib.nwf_error_cause(handle, number, length)
        causes.append(decoded(cause, length[0]))
    name = ffi.string(lib.nwf_code_name(code)).decode()
    error = _CLASSES.get(code, Error)(name, message, tuple(causes))
    place = ffi.new("nwf_place *", {"size": ffi.sizeof("nwf_place")})
    if lib.nwf_error_place(handle, place):
        document = decoded(place.document, place.document_length)
        error.place = Place(document, place.line, place.column, place.length)
    numbers = range(lib.nwf_error_diagnostic_count(handle))
    error.diagnostics = tuple(_diagnostic(handle, number) for number in numbers)
    return error


def _diagnostic(handle: Any, number: int) -> Diagnostic:
    item = ffi.new("nwf_diagnostic *", {"size": ffi.sizeof("nwf_diagnostic")})
    lib.nwf_error_diagnostic(handle, number, item)
    return Diagnostic(
        code=decoded(item.code, item.code_length),
        is_error=item.severity == lib.NWF_ERROR,
        line=item.line,
        column=item.column,
        length=item.length,
        message=decoded(item.message, item.message_length),
        help=None if item.help == ffi.NULL else decoded(item.help, item.help_length),
    )
