"""The nwfilter driver: filters the traffic of virtual machines by libvirt's nwfilter documents.

The functions are those of nwfilter.h. Objects that belong to the library are context managers, and are freed at the latest when
nobody refers to them any more.
"""

from ._driver import Driver, Transaction
from ._error import (
    BindingExists,
    Diagnostic,
    Error,
    FilterInUse,
    Forked,
    InvalidDocument,
    NoSuchBinding,
    NoSuchFilter,
    NoSuchPort,
    NoSuchSet,
    Place,
    Refused,
    SetInUse,
)
from ._events import Event, EventKind, EventQueue
from ._library import version

__all__ = [
    "BindingExists",
    "Diagnostic",
    "Driver",
    "Error",
    "Event",
    "EventKind",
    "EventQueue",
    "FilterInUse",
    "Forked",
    "InvalidDocument",
    "NoSuchBinding",
    "NoSuchFilter",
    "NoSuchPort",
    "NoSuchSet",
    "Place",
    "Refused",
    "SetInUse",
    "Transaction",
    "version",
]
