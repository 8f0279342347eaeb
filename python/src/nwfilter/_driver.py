"""The driver and its transactions."""

from __future__ import annotations

import json
import os
from typing import Any, Callable, Iterable, Optional, Union

from ._error import call
from ._events import EventQueue
from ._library import Handle, encoded, ffi, lib, taken

_Path = Union[str, "os.PathLike[str]"]
_BACKENDS = {
    "auto": lib.NWF_BACKEND_AUTO,
    "nftables": lib.NWF_BACKEND_NFTABLES,
    "xtables": lib.NWF_BACKEND_XTABLES,
    "fake": lib.NWF_BACKEND_FAKE,
}


def _lines(entries: Iterable[str]) -> str:
    return "\n".join(entries)


class Transaction(Handle):
    """Changes that `Driver.commit` makes together or not at all. Documents are read, and refused, when they are added."""

    def __init__(self) -> None:
        super().__init__(lib.nwf_transaction_new(), lib.nwf_transaction_free)

    def define(self, xml: str, document: Optional[str] = None, as_libvirt: bool = False) -> None:
        """Adds: put a filter into the store and update the ports that use it."""
        flags = lib.NWF_DEFINE_AS_LIBVIRT if as_libvirt else 0
        call(lib.nwf_transaction_define, self.pointer, *encoded(document), *encoded(xml), flags)

    def undefine(self, name: str) -> None:
        """Adds: remove a filter from the store."""
        call(lib.nwf_transaction_undefine, self.pointer, *encoded(name))

    def bind(self, xml: str, document: Optional[str] = None) -> None:
        """Adds: filter a port that has an interface and no binding."""
        call(lib.nwf_transaction_bind, self.pointer, *encoded(document), *encoded(xml))

    def replace(self, xml: str, document: Optional[str] = None) -> None:
        """Adds: filter a port, whatever it had before."""
        call(lib.nwf_transaction_replace, self.pointer, *encoded(document), *encoded(xml))

    def unbind(self, port: str) -> None:
        """Adds: stop filtering a port."""
        call(lib.nwf_transaction_unbind, self.pointer, *encoded(port))

    def define_set(self, xml: str, document: Optional[str] = None) -> None:
        """Adds: put a set into the store."""
        call(lib.nwf_transaction_define_set, self.pointer, *encoded(document), *encoded(xml))

    def undefine_set(self, name: str) -> None:
        """Adds: remove a set."""
        call(lib.nwf_transaction_undefine_set, self.pointer, *encoded(name))

    def add_to_set(self, name: str, entries: Iterable[str]) -> None:
        """Adds: add entries to a set."""
        call(lib.nwf_transaction_add_to_set, self.pointer, *encoded(name), *encoded(_lines(entries)))

    def remove_from_set(self, name: str, entries: Iterable[str]) -> None:
        """Adds: take entries out of a set."""
        call(lib.nwf_transaction_remove_from_set, self.pointer, *encoded(name), *encoded(_lines(entries)))

    def replace_in_set(self, name: str, entries: Iterable[str]) -> None:
        """Adds: put entries in the place of all entries of a set."""
        call(lib.nwf_transaction_replace_in_set, self.pointer, *encoded(name), *encoded(_lines(entries)))

    def cut_connections(self) -> None:
        """Has the commit also end the connections that could not begin by the new rules."""
        call(lib.nwf_transaction_cut_connections, self.pointer)

    def __len__(self) -> int:
        return int(lib.nwf_transaction_length(self.pointer))


class Driver(Handle):
    """Filters and bindings on disk, and the kernel as they ask for. Threads may use it at the same time.

    Answers are what nwfilter.h says of the function of the same name, as Python objects.
    """

    def __init__(
        self,
        config_dir: Optional[_Path] = None,
        state_dir: Optional[_Path] = None,
        *,
        backend: str = "auto",
        libvirt: bool = False,
        learner: bool = True,
        owner: bool = False,
        patience: Optional[float] = None,
    ) -> None:
        """Opens the stores, and changes nothing. `patience` is how many seconds a change waits for other processes.

        An `owner` owns the table of the nftables backend, so that nobody else removes it.
        """
        if backend not in _BACKENDS:
            raise ValueError(f"{backend!r} is no backend: {', '.join(_BACKENDS)}")
        config, state = (encoded(None if path is None else os.fspath(path)) for path in (config_dir, state_dir))
        options = ffi.new("nwf_options *")
        options.size = ffi.sizeof("nwf_options")
        options.config_dir, options.config_dir_length = config
        options.state_dir, options.state_dir_length = state
        options.backend = _BACKENDS[backend]
        options.stores = lib.NWF_STORES_LIBVIRT if libvirt else lib.NWF_STORES_OWN
        options.flags = (0 if learner else lib.NWF_OPEN_WITHOUT_LEARNER) | (lib.NWF_OPEN_OWNER if owner else 0)
        options.patience = 0 if patience is None else max(1, round(patience * 1000))
        driver = ffi.new("nwf_driver **")
        call(lib.nwf_driver_open, options, driver)
        super().__init__(driver[0], lib.nwf_driver_free)

    @property
    def backend(self) -> str:
        """What enforces the rules."""
        return ffi.string(lib.nwf_driver_backend(self.pointer)).decode()

    def define(self, xml: str, document: Optional[str] = None, as_libvirt: bool = False) -> dict[str, Any]:
        """Puts a filter into the store and updates the ports that use it."""
        flags = lib.NWF_DEFINE_AS_LIBVIRT if as_libvirt else 0
        return self._json(lib.nwf_driver_define, *encoded(document), *encoded(xml), flags)

    def undefine(self, name: str) -> None:
        """Removes a filter from the store; refused while a port uses it."""
        call(lib.nwf_driver_undefine, self.pointer, *encoded(name))

    def filters(self) -> list[dict[str, Any]]:
        """Every filter of the store and every stock filter."""
        return self._json(lib.nwf_driver_filters)

    def filter_xml(self, name: str) -> str:
        """A filter in canonical form."""
        return self._text(lib.nwf_driver_filter_xml, *encoded(name))

    def bind(self, xml: str, document: Optional[str] = None) -> dict[str, Any]:
        """Filters a port that has an interface and no binding."""
        return self._json(lib.nwf_driver_bind, *encoded(document), *encoded(xml))

    def replace(self, xml: str, document: Optional[str] = None) -> dict[str, Any]:
        """Filters a port, whatever it had before."""
        return self._json(lib.nwf_driver_replace, *encoded(document), *encoded(xml))

    def unbind(self, port: str) -> None:
        """Stops filtering a port."""
        call(lib.nwf_driver_unbind, self.pointer, *encoded(port))

    def bindings(self) -> list[dict[str, Any]]:
        """Every binding, and how far its port is from its filter."""
        return self._json(lib.nwf_driver_bindings)

    def binding_xml(self, port: str) -> str:
        """The binding of a port in canonical form."""
        return self._text(lib.nwf_driver_binding_xml, *encoded(port))

    def define_set(self, xml: str, document: Optional[str] = None) -> dict[str, Any]:
        """Puts a set into the store, and what it holds into the kernel."""
        return self._json(lib.nwf_driver_define_set, *encoded(document), *encoded(xml))

    def undefine_set(self, name: str) -> None:
        """Removes a set; refused while a filter, another set or a port uses it."""
        call(lib.nwf_driver_undefine_set, self.pointer, *encoded(name))

    def add_to_set(self, name: str, entries: Iterable[str]) -> dict[str, Any]:
        """Adds entries to a set, such as "10.0.0.0/24"; a comment may follow behind a "#"."""
        return self._json(lib.nwf_driver_add_to_set, *encoded(name), *encoded(_lines(entries)))

    def remove_from_set(self, name: str, entries: Iterable[str]) -> dict[str, Any]:
        """Takes entries out of a set."""
        return self._json(lib.nwf_driver_remove_from_set, *encoded(name), *encoded(_lines(entries)))

    def replace_in_set(self, name: str, entries: Iterable[str]) -> dict[str, Any]:
        """Puts entries in the place of all entries of a set."""
        return self._json(lib.nwf_driver_replace_in_set, *encoded(name), *encoded(_lines(entries)))

    def sets(self) -> list[dict[str, Any]]:
        """Every set."""
        return self._json(lib.nwf_driver_sets)

    def set_xml(self, name: str) -> str:
        """A set in canonical form."""
        return self._text(lib.nwf_driver_set_xml, *encoded(name))

    def set_content(self, name: str) -> list[str]:
        """All that a set holds, with its includes and the addresses of its tags' ports."""
        return self._json(lib.nwf_driver_set_content, *encoded(name))

    def commit(self, transaction: Transaction) -> dict[str, Any]:
        """Makes the changes of a transaction, or none of them. It has none left afterwards."""
        return self._json(lib.nwf_driver_commit, transaction.pointer)

    def plan(self, transaction: Transaction) -> dict[str, Any]:
        """What a commit would change."""
        return self._json(lib.nwf_driver_plan, transaction.pointer)

    def reload(self) -> dict[str, Any]:
        """Brings the kernel to what the bindings ask for."""
        return self._json(lib.nwf_driver_reload)

    def diff(self) -> dict[str, Any]:
        """How the kernel differs from what the bindings ask for."""
        return self._json(lib.nwf_driver_diff)

    def status(self) -> dict[str, Any]:
        """Filters, ports and the kernel at a glance."""
        return self._json(lib.nwf_driver_status)

    def explain(self, port: str, question: str) -> dict[str, Any]:
        """Which rule decides a packet, such as "in tcp to :80", and why."""
        return self._json(lib.nwf_driver_explain, *encoded(port), *encoded(question))

    def ruleset(self, xml: str, document: Optional[str] = None) -> dict[str, Any]:
        """The rules that a binding would have now."""
        return self._json(lib.nwf_driver_ruleset, *encoded(document), *encoded(xml))

    def counters(self) -> dict[str, Any]:
        """What the rules of filters have counted in the kernel."""
        return self._json(lib.nwf_driver_counters)

    def metrics(self) -> dict[str, Any]:
        """Numbers since the driver was opened."""
        return self._json(lib.nwf_driver_metrics)

    def openmetrics(self) -> str:
        """The same as OpenMetrics text."""
        return self._text(lib.nwf_driver_openmetrics)

    def events(self) -> EventQueue:
        """Follows what happens from here on."""
        queue = ffi.new("nwf_event_queue **")
        call(lib.nwf_driver_events, self.pointer, queue)
        return EventQueue(queue[0])

    def keep(self) -> None:
        """Repairs what others change, from now on."""
        call(lib.nwf_driver_keep, self.pointer)

    def stop_keeping(self) -> None:
        """Ends what `keep` began."""
        call(lib.nwf_driver_stop_keeping, self.pointer)

    def _text(self, function: Callable[..., int], *arguments: Any) -> str:
        text = ffi.new("nwf_text **")
        call(function, self.pointer, *arguments, text)
        return taken(text[0])

    def _json(self, function: Callable[..., int], *arguments: Any) -> Any:
        return json.loads(self._text(function, *arguments))
