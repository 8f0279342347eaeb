//! What calls cost in Rust and through C, with a driver without a kernel: the same work, and the same answers.

use std::hint::black_box;
use std::ptr;

use criterion::{Criterion, criterion_group, criterion_main};
use nwfilter::xml::{read_binding, write_binding};
use nwfilter::{Driver, Fake, Host};
use nwfilter_capi::*;

const BINDING: &str = "<filterbinding>
  <owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
  <portdev name='vnet0'/><mac address='52:54:00:7b:35:93'/>
  <filterref filter='clean-traffic'><parameter name='IP' value='10.0.0.2'/></filterref>
</filterbinding>";

/// A driver over a store of its own.
fn in_rust(store: &tempfile::TempDir) -> Driver {
    let dir = |name| store.path().join(name);
    let builder = Driver::builder().config_dir(dir("filters")).state_dir(dir("bindings"));
    builder.host(Host::fake()).without_learner().open(Fake::new()).unwrap()
}

/// The same through C.
fn in_c(store: &tempfile::TempDir) -> *mut nwf_driver {
    let dir = |name| store.path().join(name).to_str().unwrap().to_owned();
    let (filters, bindings) = (dir("filters"), dir("bindings"));
    let options = nwf_options {
        size: size_of::<nwf_options>(),
        config_dir: filters.as_ptr().cast(),
        config_dir_length: filters.len(),
        state_dir: bindings.as_ptr().cast(),
        state_dir_length: bindings.len(),
        backend: nwf_backend::NWF_BACKEND_FAKE as i32,
        stores: 0,
        flags: NWF_OPEN_WITHOUT_LEARNER,
        patience: 0,
    };
    let mut driver = ptr::null_mut();
    // SAFETY: the structure has its size, and its texts live until the call returns.
    assert_eq!(unsafe { nwf_driver_open(&options, &mut driver, ptr::null_mut()) }, nwf_code::NWF_OK);
    driver
}

fn bytes(text: &str) -> (*const std::ffi::c_char, usize) {
    (text.as_ptr().cast(), text.len())
}

fn compare(criterion: &mut Criterion) {
    // In memory where the machine has it, so that the disk is not measured.
    let store = || tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let stores = (store(), store());
    let (rust, c) = (in_rust(&stores.0), in_c(&stores.1));
    let (xml, xml_length) = bytes(BINDING);
    let (port, port_length) = bytes("vnet0");
    let replace_in_c = || {
        let mut error = ptr::null_mut();
        // SAFETY: the driver is open, and the text lives as long as the program.
        let code =
            unsafe { nwf_driver_replace(c, ptr::null(), 0, xml, xml_length, ptr::null_mut(), &mut error) };
        assert_eq!(code, nwf_code::NWF_OK);
    };
    let replace_in_rust = || {
        rust.replace_binding(read_binding("binding", BINDING).into_result().unwrap()).unwrap();
    };
    let vnet0 = "vnet0".parse().unwrap();
    replace_in_c();
    replace_in_rust();

    let mut group = criterion.benchmark_group("c_abi");
    group.bench_function("binding_xml/rust", |bencher| {
        bencher.iter(|| black_box(write_binding(&rust.binding(&vnet0).unwrap())));
    });
    group.bench_function("binding_xml/c", |bencher| {
        bencher.iter(|| {
            let (mut text, mut error) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the driver is open, and the text is freed once.
            unsafe {
                nwf_driver_binding_xml(c, port, port_length, &mut text, &mut error);
                black_box(nwf_text_data(text, ptr::null_mut()));
                nwf_text_free(text);
            }
        });
    });
    group.bench_function("metrics/rust", |bencher| {
        bencher.iter(|| black_box(serde_json::json!(rust.metrics()).to_string()));
    });
    group.bench_function("metrics/c", |bencher| {
        bencher.iter(|| {
            let (mut text, mut error) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the driver is open, and the text is freed once.
            unsafe {
                nwf_driver_metrics(c, &mut text, &mut error);
                black_box(nwf_text_data(text, ptr::null_mut()));
                nwf_text_free(text);
            }
        });
    });
    group.bench_function("replace/rust", |bencher| bencher.iter(replace_in_rust));
    group.bench_function("replace/c", |bencher| bencher.iter(replace_in_c));
    group.finish();
    // SAFETY: it is freed once, and nobody uses it any more.
    unsafe { nwf_driver_free(c) };
}

criterion_group!(benches, compare);
criterion_main!(benches);
