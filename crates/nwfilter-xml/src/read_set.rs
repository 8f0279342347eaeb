//! Reads `<filterset>`. The language is ours, so whatever it does not know is refused.

use std::collections::{BTreeSet, HashSet};
use std::str::FromStr;

use roxmltree::Node;

use crate::Error;
use crate::code::Code;
use crate::diag::nearest;
use crate::read::{Reader, attribute, is_of_the_language, name_of};
use crate::set::{
    COMMENT, FilterSet, MAX_SET_ENTRIES, SetEntry, SetFamily, SetName, SetRange, Tag, is_comment,
};

const ELEMENTS: [&str; 3] = ["entry", "include", "tag"];

impl Reader<'_> {
    pub(crate) fn filter_set(&mut self, node: Node<'_, '_>) -> Option<FilterSet> {
        self.only(node, &["name", "family"]);
        let name = self.needed::<SetName>(node, "name", "admins", Code::BadName);
        let family = self.needed::<SetFamily>(node, "family", "ipv4", Code::BadSetFamily);
        let (mut entries, mut includes, mut tags) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        let (mut known, mut members) = (HashSet::new(), 0);
        for child in self.child_elements(node) {
            members += 1;
            if members > MAX_SET_ENTRIES {
                let message = format!("a set has at most {MAX_SET_ENTRIES} entries");
                self.problems.error(Code::TooManySetEntries, self.tag(child), message, None);
                break;
            }
            match name_of(child) {
                "entry" => {
                    if let Some(entry) = self.set_entry(child, family)
                        && known.insert(entry.range)
                    {
                        entries.push(entry);
                    }
                }
                "include" => {
                    self.only(child, &["set"]);
                    let set = self.needed::<SetName>(child, "set", "admins", Code::BadName);
                    if set.is_some() && set == name {
                        let message = "the set includes itself";
                        self.problems.error(Code::SetIncludesItself, child.range(), message, None);
                    }
                    includes.extend(set);
                }
                "tag" => {
                    self.only(child, &["name"]);
                    if family == Some(SetFamily::Port) {
                        let message = "a set of ports has no tags: a tag stands for addresses of guests";
                        self.problems.error(Code::BadSetEntry, child.range(), message, None);
                    }
                    tags.extend(self.needed::<Tag>(child, "name", "web", Code::BadName));
                }
                other => {
                    let message = format!("a set has no element <{other}>");
                    let help = nearest(other, ELEMENTS).map(|near| format!("did you mean <{near}>?"));
                    self.problems.error(Code::UnknownInSet, self.tag(child), message, help);
                }
            }
        }
        let (includes, tags) = (includes.into_iter().collect(), tags.into_iter().collect());
        Some(FilterSet { name: name?, family: family?, entries, includes, tags })
    }

    fn set_entry(&mut self, node: Node<'_, '_>, family: Option<SetFamily>) -> Option<SetEntry> {
        self.only(node, &["value", "comment"]);
        let comment = attribute(node, "comment").filter(|a| !a.value().is_empty());
        if let Some(a) = comment.filter(|a| !is_comment(a.value())) {
            self.problems.error(Code::BadSetEntry, a.range_value(), COMMENT, None);
        }
        let Some(a) = attribute(node, "value") else {
            let help = format!("<entry value='{}'/>", family.map_or("10.0.0.1", example));
            let message = "<entry> has no attribute 'value'";
            self.problems.error(Code::MissingAttribute, self.tag(node), message, Some(help));
            return None;
        };
        // Without a family there is an error already, and nothing that values could be compared with.
        match SetRange::parse(family?, a.value()) {
            Ok(range) => Some(SetEntry { range, comment: comment.map(|a| a.value().to_owned()) }),
            Err(why) => {
                self.problems.error(Code::BadSetEntry, a.range_value(), why.to_string(), None);
                None
            }
        }
    }

    /// An attribute that must be there.
    pub(crate) fn needed<T: FromStr<Err = Error>>(
        &mut self,
        node: Node<'_, '_>,
        name: &str,
        example: &str,
        wrong: Code,
    ) -> Option<T> {
        let Some(a) = attribute(node, name) else {
            let element = name_of(node);
            let message = format!("<{element}> has no attribute '{name}'");
            let help = format!("<{element} {name}='{example}'>");
            self.problems.error(Code::MissingAttribute, self.tag(node), message, Some(help));
            return None;
        };
        self.parsed(wrong, &a, a.value().parse())
    }

    /// Refuses attributes that an element does not have.
    fn only(&mut self, node: Node<'_, '_>, known: &[&str]) {
        for a in node.attributes().filter(|a| !known.contains(&a.name()) && is_of_the_language(a)) {
            let message = format!("<{}> has no attribute '{}'", name_of(node), a.name());
            let help = nearest(a.name(), known.iter().copied()).map(|near| format!("did you mean '{near}'?"));
            self.problems.error(Code::UnknownInSet, a.range(), message, help);
        }
    }
}

fn example(family: SetFamily) -> &'static str {
    match family {
        SetFamily::Ipv4 => "10.0.0.1",
        SetFamily::Ipv6 => "fd00::1",
        SetFamily::Mac => "52:54:00:12:34:56",
        SetFamily::Port => "80",
    }
}
