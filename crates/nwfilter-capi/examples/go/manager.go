// A virtualization manager in Go: it filters the ports of a guest while the guest runs, and tells what happens.
//
//	go build            (cgo asks pkg-config for libnwfilter)
//	manager STORE BACKEND PORT MAC IP [PORT MAC IP]...
//
// STORE is a directory for filters and bindings, BACKEND is auto, nftables, xtables or fake, each PORT is a tap device. It
// ends at the end of its input.
package main

/*
#cgo pkg-config: nwfilter
#include <nwfilter.h>
#include <poll.h>
#include <stdlib.h>
*/
import "C"

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"
)

const filter = `<filter name='web-server'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='accept' direction='out'><udp dstportstart='53'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>`

const binding = `<filterbinding>
  <owner><name>guest</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='%s'/><mac address='%s'/>
  <filterref filter='web-server'><parameter name='IP' value='%s'/></filterref>
</filterbinding>`

var backends = map[string]C.int32_t{
	"auto":     C.NWF_BACKEND_AUTO,
	"nftables": C.NWF_BACKEND_NFTABLES,
	"xtables":  C.NWF_BACKEND_XTABLES,
	"fake":     C.NWF_BACKEND_FAKE,
}

// failure is an error of the library, which is freed here.
func failure(code C.nwf_code, handle *C.nwf_error) error {
	if code == C.NWF_OK {
		return nil
	}
	defer C.nwf_error_free(handle)
	texts := []string{C.GoString(C.nwf_error_message(handle, nil))}
	for number := C.size_t(0); number < C.nwf_error_cause_count(handle); number++ {
		texts = append(texts, C.GoString(C.nwf_error_cause(handle, number, nil)))
	}
	place := C.nwf_place{size: C.sizeof_nwf_place}
	where := ""
	if C.nwf_error_place(handle, &place) == 1 {
		where = fmt.Sprintf("%s:%d: ", C.GoString(place.document), place.line)
	}
	return fmt.Errorf("%s%s: %s", where, C.GoString(C.nwf_code_name(C.int32_t(code))), strings.Join(texts, ": "))
}

// given calls a function with a text in C's memory.
func given(text string, call func(data *C.char, length C.size_t) C.nwf_code) C.nwf_code {
	data := C.CString(text)
	defer C.free(unsafe.Pointer(data))
	return call(data, C.size_t(len(text)))
}

func open(store string, backend C.int32_t) (*C.nwf_driver, error) {
	filters, bindings := C.CString(filepath.Join(store, "filters")), C.CString(filepath.Join(store, "bindings"))
	defer C.free(unsafe.Pointer(filters))
	defer C.free(unsafe.Pointer(bindings))
	// In C's memory, since it has pointers into that.
	options := (*C.nwf_options)(C.calloc(1, C.sizeof_nwf_options))
	defer C.free(unsafe.Pointer(options))
	options.size = C.sizeof_nwf_options
	options.config_dir, options.config_dir_length = filters, C.NWF_ZERO_TERMINATED
	options.state_dir, options.state_dir_length = bindings, C.NWF_ZERO_TERMINATED
	options.backend = backend
	var driver *C.nwf_driver
	var handle *C.nwf_error
	code := C.nwf_driver_open(options, &driver, &handle)
	return driver, failure(code, handle)
}

// start is called before the guest runs: it defines the filter and binds all ports, or changes nothing.
func start(driver *C.nwf_driver, ports []string) error {
	transaction := C.nwf_transaction_new()
	defer C.nwf_transaction_free(transaction)
	var handle *C.nwf_error
	code := given(filter, func(data *C.char, length C.size_t) C.nwf_code {
		return C.nwf_transaction_define(transaction, nil, 0, data, length, 0, &handle)
	})
	if err := failure(code, handle); err != nil {
		return err
	}
	for at := 0; at < len(ports); at += 3 {
		text := fmt.Sprintf(binding, ports[at], ports[at+1], ports[at+2])
		code := given(text, func(data *C.char, length C.size_t) C.nwf_code {
			return C.nwf_transaction_replace(transaction, nil, 0, data, length, &handle)
		})
		if err := failure(code, handle); err != nil {
			return err
		}
	}
	var report *C.nwf_text
	code = C.nwf_driver_commit(driver, transaction, &report, &handle)
	if err := failure(code, handle); err != nil {
		return err
	}
	defer C.nwf_text_free(report)
	fmt.Println("done:", C.GoString(C.nwf_text_data(report, nil)))
	return nil
}

// stop is called when the guest is gone.
func stop(driver *C.nwf_driver, ports []string) error {
	transaction := C.nwf_transaction_new()
	defer C.nwf_transaction_free(transaction)
	var handle *C.nwf_error
	for at := 0; at < len(ports); at += 3 {
		code := given(ports[at], func(data *C.char, length C.size_t) C.nwf_code {
			return C.nwf_transaction_unbind(transaction, data, length, &handle)
		})
		if err := failure(code, handle); err != nil {
			return err
		}
	}
	code := C.nwf_driver_commit(driver, transaction, nil, &handle)
	return failure(code, handle)
}

// tell prints events until the driver is freed.
func tell(queue *C.nwf_event_queue, done chan<- error) {
	wait := C.struct_pollfd{fd: C.int(C.nwf_event_queue_fd(queue)), events: C.POLLIN}
	for {
		var handle *C.nwf_error
		event := C.nwf_event{size: C.sizeof_nwf_event}
		if err := failure(C.nwf_event_queue_next(queue, &event, &handle), handle); err != nil {
			done <- err
			return
		}
		switch event.kind {
		case C.NWF_EVENT_NONE:
			C.poll(&wait, 1, -1)
		case C.NWF_EVENT_CLOSED:
			done <- nil
			return
		default:
			fmt.Println(C.GoString(C.nwf_event_kind_name(C.int32_t(event.kind))), C.GoString(&event.name[0]))
		}
	}
}

func run(store string, backend C.int32_t, ports []string) error {
	driver, err := open(store, backend)
	if err != nil {
		return err
	}
	var queue *C.nwf_event_queue
	var handle *C.nwf_error
	code := C.nwf_driver_events(driver, &queue, &handle)
	if err := failure(code, handle); err != nil {
		return err
	}
	defer C.nwf_event_queue_free(queue)
	done := make(chan error)
	go tell(queue, done)
	err = start(driver, ports)
	if err == nil {
		fmt.Println("the guest may run, filtered by", C.GoString(C.nwf_driver_backend(driver)))
		input := make([]byte, 64)
		for {
			if _, ended := os.Stdin.Read(input); ended != nil {
				break
			}
		}
		err = stop(driver, ports)
	}
	C.nwf_driver_free(driver)
	if told := <-done; err == nil {
		err = told
	}
	return err
}

func main() {
	arguments := os.Args[1:]
	if len(arguments) < 5 || len(arguments)%3 != 2 {
		fmt.Fprintln(os.Stderr, "usage: manager STORE BACKEND PORT MAC IP [PORT MAC IP]...")
		os.Exit(2)
	}
	backend, known := backends[arguments[1]]
	if !known {
		fmt.Fprintln(os.Stderr, "BACKEND is auto, nftables, xtables or fake")
		os.Exit(2)
	}
	if err := run(arguments[0], backend, arguments[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
