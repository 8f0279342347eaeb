"""A virtualization manager in Python: it filters the ports of a guest while the guest runs, and tells what happens.

    manager.py STORE BACKEND PORT MAC IP [PORT MAC IP]...

STORE is a directory for filters and bindings, BACKEND is auto, nftables, xtables or fake, each PORT is a tap device. It ends at
the end of its input.
"""

import os
import selectors
import sys
from xml.sax.saxutils import quoteattr

from nwfilter import Driver, Error, EventQueue, Transaction

FILTER = """<filter name='web-server'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>"""


def binding(port: str, mac: str, ip: str) -> str:
    return f"""<filterbinding>
  <owner><name>guest</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name={quoteattr(port)}/><mac address={quoteattr(mac)}/>
  <filterref filter='web-server'><parameter name='IP' value={quoteattr(ip)}/></filterref>
</filterbinding>"""


def tell(events: EventQueue) -> None:
    for event in events:
        print(event.kind.value, event.name, flush=True)


def run(store: str, backend: str, ports: list[tuple[str, str, str]]) -> None:
    filters, bindings = os.path.join(store, "filters"), os.path.join(store, "bindings")
    with Driver(filters, bindings, backend=backend) as driver, driver.events() as events:
        with Transaction() as start:
            start.define(FILTER, document="web-server.xml")
            for port in ports:
                start.replace(binding(*port))
            print("done:", driver.commit(start))
        print(f"the guest may run, filtered by {driver.backend}", flush=True)

        # Any main loop will do: the events have a file descriptor.
        with selectors.PollSelector() as selector:
            selector.register(events, selectors.EVENT_READ, lambda: tell(events) or True)
            selector.register(0, selectors.EVENT_READ, lambda: os.read(0, 64))
            while all(key.data() for key, _ in selector.select()):
                pass

        with Transaction() as stop:
            for name, _, _ in ports:
                stop.unbind(name)
            driver.commit(stop)
        tell(events)


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) < 5 or len(arguments) % 3 != 2:
        print("usage: manager.py STORE BACKEND PORT MAC IP [PORT MAC IP]...", file=sys.stderr)
        return 2
    store, backend, *rest = arguments
    try:
        run(store, backend, list(zip(rest[::3], rest[1::3], rest[2::3])))
    except Error as error:
        print(f"{error.place or ''} {error.code}: {error}".strip(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
