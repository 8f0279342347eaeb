//! The codes of diagnostics. docs/diagnostics.md is written from this table.

use std::fmt;

macro_rules! codes {
    ($($number:literal $name:ident $title:literal $explanation:literal)+) => {
        /// What kind of problem a diagnostic is about: `NWF0012`. A number never changes its meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $title] $name = $number,)+
        }

        impl Code {
            /// Every code, by number.
            pub const ALL: &[Code] = &[$(Code::$name),+];

            /// The problem in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)+ }
            }

            /// What the problem means and what to do about it, as Markdown.
            pub fn explanation(self) -> &'static str {
                match self { $(Code::$name => $explanation,)+ }
            }
        }
    };
}

codes! {
    1 DocumentTooLong "The document is too long"
        "A document has at most 4 MiB, which is also the longest string that libvirt's protocol carries. Divide the filter, \
         and include the parts with `<filterref>`. A `<filterset>` has at most 64 MiB."
    2 TooDeep "Elements are nested too deep"
        "Elements are nested at most 257 deep, as in libxml2. No element of the language needs more than four."
    3 TooManyAttributes "An element has too many attributes"
        "An element has at most 256 attributes. No element of the language has more than 40."
    4 TooManyParts "The document has too many parts"
        "A document has at most 1,000,000 elements and texts, and at most 256 declarations of namespaces (`xmlns`)."
    5 DocumentType "The document has a document type with declarations"
        "`<!DOCTYPE … [ … ]>` is not read, because it can make a short document arbitrarily long. Take it out. A document \
         type without brackets has no effect."
    6 MalformedXml "The document is not well-formed XML"
        "The message says what was expected at this place. Frequent causes: a quote is missing, an end tag does not have the \
         name of its start tag, `&` or `<` is not written as `&amp;` or `&lt;`."
    7 EndsEarly "The document ends too early"
        "The text ends inside an element, a tag or a comment; the message names what is open. The file was probably not \
         written or copied as a whole."
    8 EmptyDocument "The document is empty"
        "The file has no content, or only white space and comments."
    9 NotUtf8 "The document is not UTF-8"
        "Documents are read as UTF-8. The message names the encoding that the bytes look like. Convert the file, for \
         instance with `iconv -f ISO-8859-1 -t UTF-8`, and correct the `encoding` in its XML declaration."
    10 WrongDocument "The document is about something else"
        "The root element is not the expected one: `<filter>`, `<filterbinding>`, `<domain>` or `<filterset>`."
    11 MissingAttribute "A required attribute is missing"
        "The message says which attribute the element needs."
    12 MissingElement "A required element is missing"
        "The message says which element the document needs."
    13 BadName "A name cannot be used"
        "A filter is stored in a file of its name, and a port is named in rules of the kernel. The message says which \
         characters the name may have and how long it may be."
    14 BadChain "A chain cannot be used"
        "A chain is `root`, or has at most 12 characters and starts with mac, vlan, stp, arp, rarp, ipv4 or ipv6, which say \
         which frames enter it."
    15 BadPriority "The priority of a filter is out of range"
        "A priority is a number from -1000 to 1000."
    16 BadUuid "A UUID cannot be read"
        "A UUID has 32 hex digits. A filter without `<uuid>` gets one."
    17 BadMac "A MAC address cannot be read"
        "A MAC address has six bytes in hex, as 52:54:00:12:34:56."
    18 TooManyEntries "A filter has too many rules and includes"
        "A filter has at most 65,536 rules and includes."
    19 TooManyValues "A document passes too many values"
        "A document passes at most 65,536 values to filters."
    20 UnknownWord "An action or a direction is unknown"
        "The action of a rule is drop, accept, reject, return or continue; its direction is in, out or inout. Both are \
         written in lower case."
    21 UnknownProtocol "A rule has an element that is no protocol"
        "libvirt ignores an element that it does not know. A rule whose only element is misspelt (`<tpc dstportstart='80'/>`) \
         then matches every frame: `accept` opens the port. So the document is refused. With `--as-libvirt`, and in the \
         libvirt module, the element is ignored as libvirt does. Elements of a foreign namespace are always ignored."
    22 UnknownCondition "A protocol does not have an attribute"
        "libvirt ignores an attribute that an element does not have. The rule then matches more than is meant: \
         `<tcp dstportstrt='80'/>` matches every port. So the document is refused. With `--as-libvirt`, and in the libvirt \
         module, the attribute is ignored as libvirt does. Attributes of a foreign namespace are always ignored."
    23 BadValue "A value cannot be read"
        "The message says what the attribute needs. docs/language.md lists the kinds of values."
    24 BadVariable "A variable cannot be read"
        "A variable is `$NAME` (all values), `$NAME[3]` (one of them) or `$NAME[@2]` (iterator 2). A name has letters, digits \
         and `_`; iterators have the numbers 0 to 1000."
    25 PortWithoutProtocol "A port needs a protocol that has ports"
        "On `<ip>` and `<ipv6>` the attributes of ports need `protocol` to be tcp, udp, sctp or 33 (DCCP), and to be no \
         variable."
    26 UnknownElement "An element is ignored"
        "The language has no such element here, and it is ignored, as libvirt does."
    27 UnknownAttribute "An attribute is ignored"
        "The element does not have this attribute, and it is ignored, as libvirt does."
    28 IgnoredText "Text is ignored"
        "Text between elements has no effect."
    29 SecondUuid "A second UUID is ignored"
        "Only the first `<uuid>` of a filter counts."
    30 PriorityWithoutChain "The priority of a filter is ignored"
        "libvirt ignores the priority of a filter that does not name its chain. Add `chain='root'`."
    31 RulePriority "The priority of a rule is replaced"
        "libvirt puts 500 in place of a priority that is no number from -1000 to 1000."
    32 OddTruthValue "A truth value is spelt oddly"
        "libvirt takes any word, and not always as one would think. The message says what this one counts as."
    33 OddSpelling "A value is spelt oddly"
        "The value is read, but its spelling hides what it is, as `010.0.0.1`, which is 8.0.0.1. The message says what is \
         read; write that."
    34 CommentCut "A comment is cut"
        "The kernel keeps 256 bytes of a comment."
    35 SecondProtocol "A second protocol is ignored"
        "A rule is about one protocol, that of its first element. Elements of another protocol are ignored, as libvirt \
         does. Give each protocol a rule of its own."
    36 ReplacedAttribute "An attribute is given twice"
        "Of an attribute that several elements of a rule give, the last one counts."
    37 TextAfterVariable "Text after a variable is ignored"
        "What follows `]` has no effect."
    38 SignOfAnother "An attribute has the sign of another"
        "`match='no'` on the destination port follows that of the source port, as in libvirt. Use two rules if the signs \
         have to differ."
    39 IpsetFlags "An ipset means more to libvirt"
        "libvirt drops an ipset that has `ipsetflags` on this element, and the rule then matches whatever is in the set; \
         nwfilter matches on the set. Without an ipset, `ipsetflags` has no effect."
    40 WithoutEffect "An attribute has no effect"
        "The attribute needs another one that is missing, or another one takes its place. The message names it."
    41 EmptyRange "A range is empty"
        "The end of the range is before its start, so the rule never matches."
    42 NeverMatches "A rule never matches"
        "No frame of the rule's protocol enters the chain of its filter. Put the rule into a filter with the chain that the \
         message names."
    43 IgnoredParameter "A parameter is ignored"
        "libvirt ignores a parameter without a name or a value, and one whose value has other characters than letters, \
         digits and `_ . :`."
    44 MetadataWithoutEffect "A filter or a tag in the metadata has no effect"
        "The interface has a `<filterref>` of its own, or has none although it has tags, or the domain has no interface of this MAC \
         address."
    45 NoSuchFilter "An included filter does not exist"
        "Neither the checked files nor the store nor the stock filters have a filter of this name. libvirt takes the \
         document, but no port can be bound to it."
    46 IncludesItself "A filter includes itself"
        "Directly or through others the filter includes itself. The message shows the circle."
    47 CannotRead "A file cannot be read"
        "The file does not exist, or its permissions do not let it be read. The message says which."
    48 BadAddress "The address of a guest cannot be read"
        "A parameter `IP` or `IPV6` is no IP address. libvirt drops it, and then learns the address from whatever the guest \
         sends. Give one address without a prefix length; each address is a parameter of its own."
    49 TooLarge "A filter expands to too much"
        "With the filters that it includes, the filter expands to more than 100,000 rules or includes, so no port can be \
         bound to it. Filters that are included more than once multiply."
    50 TooManySetEntries "A set has too many entries"
        "A set has at most 262,144 entries, those of the sets that it includes and the addresses of its tags' ports among \
         them. Networks and ranges are one entry each."
    51 BadSetFamily "The family of a set is unknown"
        "A set holds IPv4 addresses (`ipv4`), IPv6 addresses (`ipv6`), MAC addresses (`mac`) or ports (`port`)."
    52 BadSetEntry "An entry of a set cannot be read"
        "The message says what an entry of the set's family looks like. All entries of a set are of one family. A network \
         is written with its first address. A comment has at most 256 bytes."
    53 UnknownInSet "A set has an element or an attribute that it cannot have"
        "A `<filterset>` has `name` and `family`, and `<entry value= comment=>`, `<include set=>` and `<tag name=>` in it. \
         What is mistyped would silently be missing from the set, so the document is refused."
    54 SetIncludesItself "A set includes itself"
        "Directly or through others the set includes itself."
}

impl Code {
    /// Its number.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// Whether libvirt's reading of the document makes a rule match more than is written.
    pub fn widens_a_rule(self) -> bool {
        matches!(self, Code::UnknownProtocol | Code::UnknownCondition)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NWF{:04}", self.number())
    }
}
