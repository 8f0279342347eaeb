"""What happens, for loops that wait for many things."""

from __future__ import annotations

import select
from dataclasses import dataclass
from enum import Enum
from typing import Any, Iterator, Optional

from ._error import call
from ._library import Handle, ffi, lib


class EventKind(Enum):
    """What happened."""

    FILTER_DEFINED = "filter-defined"
    FILTER_UNDEFINED = "filter-undefined"
    SET_DEFINED = "set-defined"
    SET_CHANGED = "set-changed"
    SET_UNDEFINED = "set-undefined"
    SET_FAILED = "set-failed"
    BINDING_CREATED = "binding-created"
    BINDING_REPLACED = "binding-replaced"
    BINDING_DELETED = "binding-deleted"
    ADDRESS_CHANGED = "address-changed"
    DRIFT_REPAIRED = "drift-repaired"
    HOST_REPAIRED = "host-repaired"
    LOST = "lost"
    OTHER = "other"


@dataclass(frozen=True)
class Event:
    """Something that happened to a filter, a set or a port, whose name it has."""

    kind: EventKind
    name: str
    #: Of ADDRESS_CHANGED how far the port is from its filter, such as "learned".
    state: str
    #: Of LOST how many events are missing.
    lost: int


class EventQueue(Handle):
    """The events of a driver since `Driver.events`. Iterating gives those that wait, and never waits itself."""

    def __init__(self, pointer: Any) -> None:
        super().__init__(pointer, lib.nwf_event_queue_free)
        #: Whether the driver was closed, so that no event will come any more.
        self.is_at_end = False

    def fileno(self) -> int:
        """The file descriptor to wait for, for select, selectors and asyncio. Nobody else reads it."""
        return int(lib.nwf_event_queue_fd(self.pointer))

    def take(self) -> Optional[Event]:
        """The next event; None if none waits."""
        event = ffi.new("nwf_event *", {"size": ffi.sizeof("nwf_event")})
        call(lib.nwf_event_queue_next, self.pointer, event)
        if event.kind == lib.NWF_EVENT_CLOSED:
            self.is_at_end = True
        if event.kind in (lib.NWF_EVENT_NONE, lib.NWF_EVENT_CLOSED):
            return None
        kind = EventKind(ffi.string(lib.nwf_event_kind_name(event.kind)).decode())
        name, state = ffi.string(event.name).decode(), ffi.string(event.state).decode()
        return Event(kind, name, state, event.lost)

    def wait(self, timeout: Optional[float] = None) -> bool:
        """Waits until there may be an event, at most so many seconds."""
        return bool(select.select([self], [], [], timeout)[0])

    def __iter__(self) -> Iterator[Event]:
        while (event := self.take()) is not None:
            yield event
