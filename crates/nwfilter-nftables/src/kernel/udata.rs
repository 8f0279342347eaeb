//! User data: what nft keeps beside rules, sets and elements, and the kernel does not look at.
//!
//! Each item is a byte for its kind, a byte for its length and so many bytes, as `libnftnl/udata.h` has them. Without
//! them `nft list` shows no comments and takes keys for numbers of the wrong byte order.

use super::rule::Comment;

/// `NFTNL_UDATA_RULE_COMMENT`
const RULE_COMMENT: u8 = 0;
/// `NFTNL_UDATA_SET_ELEM_COMMENT`
const ELEMENT_COMMENT: u8 = 0;
/// `NFTNL_UDATA_OBJ_COMMENT`
const OBJECT_COMMENT: u8 = 0;
/// `NFTNL_UDATA_SET_KEYBYTEORDER`
const SET_KEY_BYTEORDER: u8 = 0;
/// `NFTNL_UDATA_SET_DATABYTEORDER`
const SET_DATA_BYTEORDER: u8 = 1;
/// `NFTNL_UDATA_SET_COMMENT`
const SET_COMMENT: u8 = 7;

/// Byte order as nft counts it, `enum byteorder`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ByteOrder {
    /// None, for concatenations and verdicts.
    None = 0,
    /// That of the machine.
    Host = 1,
    /// That of the network.
    Big = 2,
}

fn put(data: &mut Vec<u8>, kind: u8, value: &[u8]) {
    // Comments have at most 127 bytes, numbers 4.
    data.extend([kind, value.len() as u8]);
    data.extend(value);
}

fn put_comment(data: &mut Vec<u8>, kind: u8, comment: Option<&Comment>) {
    if let Some(comment) = comment {
        put(data, kind, &[comment.as_str().as_bytes(), b"\0"].concat());
    }
}

fn read_comment(mut data: &[u8], wanted: u8) -> Option<Comment> {
    while let [kind, len, rest @ ..] = data {
        let (value, rest) = rest.split_at_checked(usize::from(*len))?;
        if *kind == wanted {
            let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
            return std::str::from_utf8(&value[..end]).ok().map(Comment::new);
        }
        data = rest;
    }
    None
}

pub(super) fn of_rule(comment: Option<&Comment>) -> Vec<u8> {
    let mut data = Vec::new();
    put_comment(&mut data, RULE_COMMENT, comment);
    data
}

pub(super) fn rule_comment(data: &[u8]) -> Option<Comment> {
    read_comment(data, RULE_COMMENT)
}

pub(super) fn of_element(comment: Option<&Comment>) -> Vec<u8> {
    let mut data = Vec::new();
    put_comment(&mut data, ELEMENT_COMMENT, comment);
    data
}

pub(super) fn element_comment(data: &[u8]) -> Option<Comment> {
    read_comment(data, ELEMENT_COMMENT)
}

pub(super) fn of_object(comment: Option<&Comment>) -> Vec<u8> {
    let mut data = Vec::new();
    put_comment(&mut data, OBJECT_COMMENT, comment);
    data
}

pub(super) fn object_comment(data: &[u8]) -> Option<Comment> {
    read_comment(data, OBJECT_COMMENT)
}

pub(super) fn of_set(key: ByteOrder, value: Option<ByteOrder>, comment: Option<&Comment>) -> Vec<u8> {
    let mut data = Vec::new();
    put(&mut data, SET_KEY_BYTEORDER, &(key as u32).to_ne_bytes());
    if let Some(value) = value {
        put(&mut data, SET_DATA_BYTEORDER, &(value as u32).to_ne_bytes());
    }
    put_comment(&mut data, SET_COMMENT, comment);
    data
}

pub(super) fn set_comment(data: &[u8]) -> Option<Comment> {
    read_comment(data, SET_COMMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_is_found_behind_other_data() {
        let comment = Comment::new("ports");
        let data = of_set(ByteOrder::Host, Some(ByteOrder::None), Some(&comment));
        assert_eq!(set_comment(&data), Some(comment));
        assert_eq!(set_comment(&data[..8]), None);
        assert_eq!(rule_comment(&[0, 9, b'a']), None, "a length that is a lie");
    }
}
