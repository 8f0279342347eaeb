//! Reads the parts of `<domain>` that concern filters, and passes over the rest.

use std::collections::HashMap;

use roxmltree::Node;

use crate::code::Code;
use crate::domain::{Domain, Interface, METADATA_NAMESPACE};
use crate::model::Include;
use crate::names::MacAddr;
use crate::read::{Reader, attribute, child, parse_uuid, text_of};
use crate::read_binding::read_mac;

impl Reader<'_> {
    pub(crate) fn domain(&mut self, node: Node<'_, '_>) -> Option<Domain> {
        let name = child(node, "name").map(text_of).filter(|name| !name.is_empty());
        if name.is_none() {
            self.problems.error(Code::MissingElement, self.tag(node), "the domain has no <name>", None);
        }
        let uuid = child(node, "uuid").and_then(|element| {
            let uuid = parse_uuid(&text_of(element));
            if uuid.is_none() {
                self.problems.error(
                    Code::BadUuid,
                    element.range(),
                    "malformed UUID: expected 32 hex digits",
                    None,
                );
            }
            uuid
        });
        let devices = child(node, "devices").into_iter().flat_map(|devices| devices.children());
        let mut interfaces: Vec<_> = devices
            .filter(|child| child.is_element() && child.tag_name().name() == "interface")
            .map(|child| self.interface(child))
            .collect();
        if let Some(metadata) = child(node, "metadata") {
            self.metadata(metadata, &mut interfaces);
        }
        Some(Domain { name: name?, uuid, interfaces })
    }

    /// An interface. Names that no rule could hold are refused only where there are rules to come.
    fn interface(&mut self, node: Node<'_, '_>) -> Interface {
        let own = |element: &str, name: &str| {
            let found = child(node, element).and_then(|child| attribute(child, name));
            found.filter(|a| !a.value().is_empty())
        };
        let source = |name: &str| own("source", name).map(|a| a.value().to_owned());
        let kind = attribute(node, "type").map_or("", |a| a.value()).to_owned();
        let filter = child(node, "filterref").and_then(|element| self.include(element));
        let filtered = filter.is_some();
        let target = own("target", "dev").and_then(|a| match a.value().parse() {
            Ok(target) => Some(target),
            Err(error) => {
                // In the definition of a guest that does not run, libvirt ignores names of its own making.
                let of_libvirt = a.value().contains('%');
                if filtered && !of_libvirt {
                    self.problems.error(Code::BadName, a.range_value(), format!("{error}"), None);
                }
                None
            }
        });
        let mac = own("mac", "address").and_then(|a| self.parsed(Code::BadMac, &a, read_mac(a.value())));
        let (bridge, network) = (source("bridge"), source("network"));
        let link = if kind == "direct" { source("dev") } else { None };
        let place = self.problems.place(node.range().start);
        Interface { kind, target, mac, bridge, network, link, filter, place }
    }

    fn metadata(&mut self, node: Node<'_, '_>, interfaces: &mut [Interface]) {
        let mut by_mac = HashMap::new();
        for (index, interface) in interfaces.iter().enumerate() {
            if let Some(mac) = interface.mac {
                by_mac.entry(mac).or_insert(index);
            }
        }
        let ours = |child: &Node<'_, '_>| child.tag_name().namespace() == Some(METADATA_NAMESPACE);
        for root in node.children().filter(ours) {
            if root.tag_name().name() != "filterrefs" {
                self.warn_unknown_element(root, &["filterrefs"]);
                continue;
            }
            for child in self.child_elements(root) {
                match child.tag_name().name() {
                    "interface" => self.metadata_interface(child, interfaces, &by_mac),
                    _ => self.warn_unknown_element(child, &["interface"]),
                }
            }
        }
    }

    fn metadata_interface(
        &mut self,
        node: Node<'_, '_>,
        interfaces: &mut [Interface],
        by_mac: &HashMap<MacAddr, usize>,
    ) {
        self.warn_unknown_attributes(node, &["mac"]);
        self.warn_unknown_children(node, &["filterref"]);
        let Some((mac, filter)) = self.metadata_filter(node) else { return };
        match by_mac.get(&mac).and_then(|index| interfaces.get_mut(*index)) {
            Some(Interface { filter: Some(_), .. }) => {
                let message = "this has no effect: the interface has a <filterref> of its own";
                self.problems.warn(Code::MetadataWithoutEffect, self.tag(node), message, None);
            }
            Some(interface) => interface.filter = Some(filter),
            None => {
                // Left over from an interface that was unplugged; the others are filtered all the same.
                let message =
                    format!("this has no effect: no interface of this domain has the MAC address {mac}");
                self.problems.warn(Code::MetadataWithoutEffect, self.tag(node), message, None);
            }
        }
    }

    fn metadata_filter(&mut self, node: Node<'_, '_>) -> Option<(MacAddr, Include)> {
        let mac = attribute(node, "mac");
        let filter = child(node, "filterref");
        if mac.is_none() {
            let help = "mac='52:54:00:12:34:56', the address of the interface that is meant";
            self.problems.error(
                Code::MissingAttribute,
                self.tag(node),
                "the interface has no attribute 'mac'",
                Some(help.into()),
            );
        }
        if filter.is_none() {
            self.problems.error(
                Code::MissingElement,
                self.tag(node),
                "the interface has no <filterref>",
                None,
            );
        }
        let mac = mac.and_then(|a| self.parsed(Code::BadMac, &a, read_mac(a.value())));
        let filter = filter.and_then(|element| self.include(element));
        Some((mac?, filter?))
    }
}
