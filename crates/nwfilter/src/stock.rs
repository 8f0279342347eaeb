//! The filters that libvirt ships, embedded: they are found where a store has none of their name.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use nwfilter_xml::{Filter, FilterName, Uuid, read_filter, write_filter};

macro_rules! stock {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_str!(concat!("../stock/", $name, ".xml")))),+]
    };
}

/// Name and document of every stock filter.
pub const STOCK: [(&str, &str); 24] = stock![
    "allow-arp",
    "allow-dhcp",
    "allow-dhcp-server",
    "allow-dhcpv6",
    "allow-dhcpv6-server",
    "allow-incoming-ipv4",
    "allow-incoming-ipv6",
    "allow-ipv4",
    "allow-ipv6",
    "clean-traffic",
    "clean-traffic-gateway",
    "no-arp-ip-spoofing",
    "no-arp-mac-spoofing",
    "no-arp-spoofing",
    "no-ip-multicast",
    "no-ip-spoofing",
    "no-ipv6-multicast",
    "no-ipv6-spoofing",
    "no-mac-broadcast",
    "no-mac-spoofing",
    "no-other-l2-traffic",
    "no-other-rarp-traffic",
    "qemu-announce-self",
    "qemu-announce-self-rarp",
];

/// The namespace of the stock filters' UUIDs: each is made from its name, so that it is the same on every host.
const NAMESPACE: Uuid = Uuid::from_u128(0x6d2b_7f0e_5a2c_4c0b_9a4e_3c1f_0d8e_7b61);

/// The stock filters, read once. Unlike a filter of a store they have no file.
pub fn stock_filters() -> &'static BTreeMap<FilterName, Arc<Filter>> {
    static FILTERS: LazyLock<BTreeMap<FilterName, Arc<Filter>>> = LazyLock::new(|| {
        let read = |(name, text): (&str, &str)| {
            let mut filter = read_filter(name, text).into_result().ok()?;
            filter.uuid = Some(Uuid::new_v5(&NAMESPACE, name.as_bytes()));
            // So that a rule's line is that of what is printed.
            let filter = read_filter(name, &write_filter(&filter)).into_result().ok()?;
            Some((filter.name.clone(), Arc::new(filter)))
        };
        STOCK.into_iter().filter_map(read).collect()
    });
    &FILTERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stock_filter_is_valid_without_a_warning_and_named_as_its_file() {
        for (name, text) in STOCK {
            let reading = read_filter(name, text);
            assert_eq!(reading.diagnostics.items, [], "{}", reading.diagnostics);
            assert_eq!(reading.value.map(|filter| filter.name.to_string()).as_deref(), Some(name));
        }
        assert_eq!(stock_filters().len(), STOCK.len());
    }
}
