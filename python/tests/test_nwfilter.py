"""The package on a driver without a kernel."""

import gc
import os
import tempfile
import threading
import unittest

import nwfilter
from nwfilter import Driver, EventKind, Transaction

WEB = "<filter name='web'><rule action='drop' direction='in'><tcp dstportstart='80'/></rule></filter>"


def binding(port: str, filter: str = "web") -> str:
    return (
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>"
        f"<portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'>"
        "<parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
    )


class TheDriver(unittest.TestCase):
    def setUp(self) -> None:
        directory = self.enterContext(tempfile.TemporaryDirectory())
        self.stores = (os.path.join(directory, "filters"), os.path.join(directory, "bindings"))
        self.driver = self.enterContext(Driver(*self.stores, backend="fake"))

    def test_defines_binds_and_tells(self) -> None:
        with self.driver.events() as events, Transaction() as transaction:
            transaction.define(WEB)
            transaction.bind(binding("vnet0"))
            self.assertEqual(len(transaction), 2)
            plan = self.driver.plan(transaction)
            self.assertEqual(plan["stores"], ["filter 'web' defined", "port 'vnet0' bound"])
            self.assertFalse(events.wait(0))
            report = self.driver.commit(transaction)
            self.assertEqual((report["changed"], len(transaction)), (["vnet0"], 0))
            self.assertTrue(events.wait(10))
            kinds = [(event.kind, event.name) for event in events]
            expected = [(EventKind.FILTER_DEFINED, "web"), (EventKind.BINDING_CREATED, "vnet0")]
            self.assertEqual(kinds, expected)
        self.assertIn("dstportstart='80'", self.driver.filter_xml("web"))
        self.assertIn("portdev name='vnet0'", self.driver.binding_xml("vnet0"))
        self.assertEqual([port["port"] for port in self.driver.bindings()], ["vnet0"])
        self.assertEqual(self.driver.status()["differences"], 0)
        self.assertEqual(self.driver.explain("vnet0", "in tcp to :80")["outcome"], "dropped")
        self.assertIn("web", [row["name"] for row in self.driver.filters() if row["source"] == "store"])
        self.assertEqual(self.driver.diff()["differences"], [])
        self.assertEqual(self.driver.reload()["failed"], [])
        self.assertTrue(self.driver.counters()["rules"][0]["rule"].startswith("web:"))
        self.assertTrue(self.driver.ruleset(binding("vnet1")))
        self.assertEqual(self.driver.replace(binding("vnet0", "clean-traffic"))["changed"], ["vnet0"])
        self.driver.unbind("vnet0")
        self.driver.undefine("web")
        self.assertEqual(self.driver.metrics()["ports"], 0)
        self.assertIn("# EOF", self.driver.openmetrics())

    def test_keeps_sets_that_filters_share(self) -> None:
        asking = "<tcp ipset='admins' ipsetflags='src'/>"
        with self.driver.events() as events, Transaction() as transaction:
            transaction.define_set("<filterset name='admins' family='ipv4'><tag name='web'/></filterset>")
            transaction.add_to_set("admins", ["10.1.0.0/16 # office", "10.2.0.1"])
            transaction.define(f"<filter name='f'><rule action='accept' direction='in'>{asking}</rule></filter>")
            transaction.cut_connections()
            report = self.driver.commit(transaction)
            self.assertEqual((report["changed_sets"], report["cut"]), (["admins"], {"ended": [], "failures": []}))
            self.assertEqual(next(iter(events)).kind, EventKind.SET_DEFINED)
        self.driver.bind(binding("vnet0", "f").replace("name='IP'", "name='CTRL_TAGS' value='web'/><parameter name='IP'"))
        self.assertEqual(self.driver.set_content("admins"), ["10.0.0.2", "10.1.0.0/16", "10.2.0.1"])
        self.driver.remove_from_set("admins", ["10.2.0.1"])
        self.driver.add_to_set("admins", ["10.3.0.1"])
        self.assertEqual(self.driver.replace_in_set("admins", ["10.4.0.1"])["sets"][0]["entries"], 1)
        self.assertIn("<entry value='10.4.0.1'/>", self.driver.set_xml("admins"))
        self.assertEqual([row["tags"] for row in self.driver.sets()], [["web"]])
        self.assertEqual(self.driver.status()["sets"], 1)
        with self.assertRaises(nwfilter.SetInUse):
            self.driver.undefine_set("admins")
        with self.assertRaises(nwfilter.NoSuchSet):
            self.driver.set_xml("others")
        for wrong in ["many", "fd00::1"]:
            with self.assertRaises(nwfilter.Error) as caught:
                self.driver.add_to_set("admins", [wrong])
            self.assertEqual(caught.exception.code, "NWF_INVALID_SET")
        self.driver.unbind("vnet0")
        self.driver.undefine("f")
        with Transaction() as transaction:
            transaction.replace_in_set("admins", [])
            transaction.remove_from_set("admins", [])
            transaction.undefine_set("admins")
            self.driver.commit(transaction)
        self.assertEqual(self.driver.sets(), [])
        self.driver.define_set("<filterset name='ports' family='port'><entry value='80'/></filterset>")

    def test_raises_what_fails_with_its_place_and_causes(self) -> None:
        wrong = "<filter name='web'>\n<rule action='drop' direction='in'><tpc/></rule></filter>"
        with self.assertRaises(nwfilter.InvalidDocument) as caught:
            self.driver.define(wrong, document="web.xml")
        error = caught.exception
        self.assertEqual((error.code, str(error.place)), ("NWF_INVALID_DOCUMENT", "web.xml:2:36"))
        self.assertTrue(error.diagnostics[0].is_error and error.diagnostics[0].code.startswith("NWF"))
        self.driver.define("<filter name='who'><rule action='drop' direction='in'><ip srcipaddr='$WHO'/></rule></filter>")
        with self.assertRaises(nwfilter.Error) as caught:
            self.driver.bind(binding("vnet0", "who"))
        self.assertEqual(caught.exception.code, "NWF_NO_RULES")
        self.assertIn("WHO", caught.exception.causes[0])
        with self.assertRaises(nwfilter.NoSuchFilter):
            self.driver.filter_xml("nothing")
        with self.assertRaises(nwfilter.NoSuchBinding):
            self.driver.unbind("vnet7")
        self.driver.bind(binding("vnet0", "clean-traffic"))
        with self.assertRaises(nwfilter.BindingExists):
            self.driver.bind(binding("vnet0", "clean-traffic"))
        with self.assertRaises(ValueError):
            Driver(backend="nothing")

    def test_refuses_what_is_closed_and_lets_queues_outlive_it(self) -> None:
        events = self.driver.events()
        self.driver.close()
        self.driver.close()
        with self.assertRaises(ValueError):
            self.driver.status()
        self.assertTrue(events.wait(10))
        self.assertEqual((list(events), events.is_at_end), ([], True))
        events.close()
        with self.assertRaises(ValueError):
            events.fileno()

    def test_frees_what_nobody_closed(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            self.driver.events()
            Transaction()
        gc.collect()
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def test_keeps_the_kernel_only_once(self) -> None:
        self.driver.keep()
        with self.assertRaises(nwfilter.Error) as caught:
            self.driver.keep()
        self.assertEqual(caught.exception.code, "NWF_ALREADY_KEEPING")
        self.driver.stop_keeping()
        self.driver.keep()

    def test_is_used_by_many_threads(self) -> None:
        self.driver.define(WEB)
        failed: list[BaseException] = []

        def work(port: str) -> None:
            try:
                for _ in range(20):
                    self.driver.bind(binding(port))
                    self.driver.unbind(port)
            except BaseException as error:  # told by the main thread
                failed.append(error)

        threads = [threading.Thread(target=work, args=(f"vnet{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((failed, self.driver.bindings()), ([], []))

    def test_is_refused_in_a_child(self) -> None:
        child = os.fork()
        if child == 0:
            try:
                self.driver.status()
            except nwfilter.Forked:
                os._exit(0)
            os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.driver.status()["backend"], "fake")


if __name__ == "__main__":
    unittest.main()
