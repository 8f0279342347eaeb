//! Reads the parts of `<domain>` that concern filters, and passes over the rest.

use std::collections::{BTreeSet, HashMap};

use roxmltree::Node;

use crate::code::Code;
use crate::domain::{Domain, Interface, METADATA_NAMESPACE};
use crate::model::Include;
use crate::names::MacAddr;
use crate::read::{MAX_VALUES, Reader, attribute, child, parse_uuid, text_of};
use crate::read_binding::read_mac;
use crate::set::Tag;

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
        let mut tags =
            Tags { of_guest: BTreeSet::new(), of_interfaces: vec![BTreeSet::new(); interfaces.len()] };
        let ours = |child: &Node<'_, '_>| child.tag_name().namespace() == Some(METADATA_NAMESPACE);
        for root in node.children().filter(ours) {
            if root.tag_name().name() != "filterrefs" {
                self.warn_unknown_element(root, &["filterrefs"]);
                continue;
            }
            for child in self.child_elements(root) {
                match child.tag_name().name() {
                    "interface" => self.metadata_interface(child, interfaces, &by_mac, &mut tags),
                    "tag" => tags.of_guest.extend(self.guest_tag(child)),
                    _ => self.warn_unknown_element(child, &["interface", "tag"]),
                }
            }
        }
        for (interface, own) in interfaces.iter_mut().zip(tags.of_interfaces) {
            let Some(filter) = &mut interface.filter else { continue };
            let tags = tags.of_guest.union(&own);
            self.values += tags.clone().count();
            if self.values > MAX_VALUES {
                let message = format!("more than {MAX_VALUES} values and tags are passed");
                self.problems.error(Code::TooManyValues, self.tag(node), message, None);
                break;
            }
            filter.params.add_tags(tags);
        }
    }

    fn guest_tag(&mut self, node: Node<'_, '_>) -> Option<Tag> {
        self.warn_unknown_attributes(node, &["name"]);
        self.needed::<Tag>(node, "name", "web", Code::BadName)
    }

    fn metadata_interface(
        &mut self,
        node: Node<'_, '_>,
        interfaces: &mut [Interface],
        by_mac: &HashMap<MacAddr, usize>,
        tags: &mut Tags,
    ) {
        self.warn_unknown_attributes(node, &["mac"]);
        self.warn_unknown_children(node, &["filterref", "tag"]);
        let Some((mac, filter, own)) = self.metadata_filter(node) else { return };
        let index = by_mac.get(&mac).copied();
        let Some((index, interface)) = index.and_then(|index| Some((index, interfaces.get_mut(index)?)))
        else {
            // Left over from an interface that was unplugged; the others are filtered all the same.
            let message =
                format!("this has no effect: no interface of this domain has the MAC address {mac}");
            self.problems.warn(Code::MetadataWithoutEffect, self.tag(node), message, None);
            return;
        };
        match (filter, &interface.filter) {
            (Some(_), Some(_)) => {
                let message = match own.is_empty() {
                    true => "this has no effect: the interface has a <filterref> of its own",
                    false => "this <filterref> has no effect: the interface has one of its own",
                };
                self.problems.warn(Code::MetadataWithoutEffect, self.tag(node), message, None);
            }
            (Some(filter), None) => interface.filter = Some(filter),
            (None, Some(_)) => {}
            (None, None) => {
                let message =
                    "these tags have no effect: the interface has no <filterref>, here or of its own";
                self.problems.warn(Code::MetadataWithoutEffect, self.tag(node), message, None);
            }
        }
        if let Some(tags) = tags.of_interfaces.get_mut(index) {
            tags.extend(own);
        }
    }

    /// The MAC address, the filter and the tags of an interface, of which it must have one.
    fn metadata_filter(&mut self, node: Node<'_, '_>) -> Option<(MacAddr, Option<Include>, BTreeSet<Tag>)> {
        let mac = attribute(node, "mac");
        let filter = child(node, "filterref");
        let tags: Vec<_> = node
            .children()
            .filter(|child| child.is_element() && child.tag_name().name() == "tag")
            .map(|child| self.guest_tag(child))
            .collect();
        if mac.is_none() {
            let help = "mac='52:54:00:12:34:56', the address of the interface that is meant";
            self.problems.error(
                Code::MissingAttribute,
                self.tag(node),
                "the interface has no attribute 'mac'",
                Some(help.into()),
            );
        }
        if filter.is_none() && tags.is_empty() {
            self.problems.error(
                Code::MissingElement,
                self.tag(node),
                "the interface has no <filterref>",
                None,
            );
        }
        let mac = mac.and_then(|a| self.parsed(Code::BadMac, &a, read_mac(a.value())));
        let filter = match filter {
            Some(element) => Some(self.include(element)?),
            None if tags.is_empty() => return None,
            None => None,
        };
        Some((mac?, filter, tags.into_iter().flatten().collect()))
    }
}

/// The tags that metadata give.
struct Tags {
    /// To all interfaces that have a filter.
    of_guest: BTreeSet<Tag>,
    /// To each of them.
    of_interfaces: Vec<BTreeSet<Tag>>,
}
