//! Gives the shared library the name by which programs load it, and builds it again when its version changes.

fn main() {
    // The first number of the ABI's version, which a test compares with NWF_ABI_VERSION.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnwfilter.so.1");
    println!("cargo:rerun-if-changed=build.rs");
}
