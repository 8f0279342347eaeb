//! Names of tables, chains, sets and objects.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A name that nft cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no name for nftables: at most 127 characters, the first a letter, '_' or '.', the others letters, digits \
     or one of '/', '-', '_', '.'"
)]
pub struct InvalidName(String);

/// Longest name, in bytes. The kernel takes 255 (`NFT_NAME_MAXLEN`), nft reads 127.
const MAX: usize = 127;

fn check(name: &str) -> Result<(), InvalidName> {
    let first = |c: char| c.is_ascii_alphabetic() || matches!(c, '_' | '.');
    let other = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.');
    let valid = name.len() <= MAX && name.starts_with(first) && name.chars().all(other);
    if valid { Ok(()) } else { Err(InvalidName(name.into())) }
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => { $(
        $(#[$doc])*
        ///
        /// Read with [`str::parse`], which takes what nft can read back. Cheap to clone.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(name: &str) -> Result<Self, InvalidName> {
                check(name).map(|()| Self(name.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    )+ };
}

names! {
    /// The name of a table.
    TableName,
    /// The name of a chain.
    ChainName,
    /// The name of a set or a map.
    SetName,
    /// The name of a stateful object, such as a conntrack helper.
    ObjectName,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_nft_reads_are_taken() {
        for name in ["nwfilter", "_a", ".b", "c-1/x_y.z", &"a".repeat(127)] {
            assert_eq!(name.parse::<ChainName>().unwrap().as_str(), name);
        }
        for name in ["", "1a", "-a", "a b", "a:b", "ä", "a\0", &"a".repeat(128)] {
            assert_eq!(name.parse::<ChainName>(), Err(InvalidName(name.into())));
        }
    }
}
