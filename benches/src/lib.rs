//! Criterion benches of nwfilter; see `benches/`.
