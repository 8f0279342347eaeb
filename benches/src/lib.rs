//! Criterion benches of nwfilter; see `benches/`. Here is what they share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use nwfilter_xml::{Binding, Filter, FilterName, read_binding, read_filter};

/// The two seed filters and the stock filters they include, parsed.
pub fn seed_filters() -> Result<BTreeMap<FilterName, Filter>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xml-fixtures");
    let mut filters = BTreeMap::new();
    for directory in ["seed", "stock"] {
        for entry in fs::read_dir(fixtures.join(directory))? {
            let path = entry?.path();
            let text = fs::read_to_string(&path)?;
            let filter = read_filter(&path.display().to_string(), &text).into_result()?;
            filters.insert(filter.name.clone(), filter);
        }
    }
    Ok(filters)
}

/// A port bound to a filter, with the address 10.0.0.2.
pub fn binding(port: &str, filter: &str) -> Result<Binding> {
    let text = format!(
        "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>\
         <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'>\
         <parameter name='IP' value='10.0.0.2'/></filterref></filterbinding>"
    );
    Ok(read_binding("binding", &text).into_result()?)
}
