//! Reads `<filterbinding>`.

use roxmltree::Node;
use uuid::Uuid;

use crate::binding::{Binding, Owner};
use crate::code::Code;
use crate::names::MacAddr;
use crate::read::{Reader, attribute, child, parse_uuid, text_of};
use crate::value::parse_mac;

impl Reader<'_> {
    pub(crate) fn binding(&mut self, node: Node<'_, '_>) -> Option<Binding> {
        self.warn_unknown_children(node, &["owner", "portdev", "linkdev", "mac", "filterref"]);
        let owner = self.owner(node);
        let port = self.child_attribute(node, "portdev", "name", "vnet0", Code::BadName, str::parse);
        let link = child(node, "linkdev").and_then(|link| attribute(link, "name"));
        let link = link.map(|a| a.value().to_owned()).filter(|name| !name.is_empty());
        let mac = self.child_attribute(node, "mac", "address", "52:54:00:12:34:56", Code::BadMac, read_mac);
        let filter =
            self.child_attribute(node, "filterref", "filter", "clean-traffic", Code::BadName, str::parse);
        let params = child(node, "filterref").map(|include| self.params(include)).unwrap_or_default();
        Some(Binding { owner: owner?, port: port?, link, mac: mac?, filter: filter?, params })
    }

    fn owner(&mut self, node: Node<'_, '_>) -> Option<Owner> {
        let Some(owner) = child(node, "owner") else {
            let help = "<owner><name>GUEST</name><uuid>…</uuid></owner>";
            self.problems.error(
                Code::MissingElement,
                self.tag(node),
                "the binding has no <owner>",
                Some(help.into()),
            );
            return None;
        };
        let name = child(owner, "name").map(text_of).filter(|name| !name.is_empty());
        if name.is_none() {
            self.problems.error(Code::MissingElement, self.tag(owner), "the owner has no <name>", None);
        }
        let uuid = self.owner_uuid(owner);
        Some(Owner { name: name?, uuid: uuid? })
    }

    fn owner_uuid(&mut self, owner: Node<'_, '_>) -> Option<Uuid> {
        let Some((element, text)) = child(owner, "uuid").map(|uuid| (uuid, text_of(uuid))) else {
            self.problems.error(Code::MissingElement, self.tag(owner), "the owner has no <uuid>", None);
            return None;
        };
        let uuid = parse_uuid(&text);
        if uuid.is_none() {
            self.problems.error(
                Code::BadUuid,
                element.range(),
                "malformed UUID: expected 32 hex digits",
                None,
            );
        }
        uuid
    }

    /// The attribute of a child element, both of which must be there.
    fn child_attribute<T>(
        &mut self,
        node: Node<'_, '_>,
        element: &str,
        name: &str,
        example: &str,
        wrong: Code,
        parse: impl Fn(&str) -> Result<T, crate::Error>,
    ) -> Option<T> {
        let found = child(node, element).and_then(|n| attribute(n, name));
        let Some(a) = found else {
            let there = child(node, element);
            let code = if there.is_some() { Code::MissingAttribute } else { Code::MissingElement };
            let message = format!("the binding has no <{element} {name}=…>");
            let help = format!("add <{element} {name}='{example}'/>");
            self.problems.error(code, self.tag(there.unwrap_or(node)), message, Some(help));
            return None;
        };
        self.parsed(wrong, &a, parse(a.value()))
    }
}

/// A MAC address as libvirt reads it: what follows white space has no effect.
pub(crate) fn read_mac(text: &str) -> Result<MacAddr, crate::Error> {
    parse_mac(text).map_or_else(|| text.parse(), Ok)
}
