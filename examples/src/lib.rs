//! Runnable examples of nwfilter; see the `[[example]]` files.
