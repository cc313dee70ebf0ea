//! Decides whether the client library can read the header frame of a message, and makes a frame in place of one that it
//! cannot.
//!
//! Must never recurse deeper than `MAX_DEPTH`, and never allocate while it decides: the bytes may be hostile.

/// How deep tables and arrays may be nested. `x-death` needs three levels; at a thousand the library overflows its
/// stack.
const MAX_DEPTH: usize = 32;
/// How many bytes of a frame are kept free for the headers that the daemon adds when it parks a message: a reason, the name of a
/// queue, a user and an id.
pub(in crate::broker) const RESERVED_BYTES: usize = 1_536;
/// The header that replaces properties that cannot be read. Its value is their original bytes: the flags, then the
/// properties. It is empty if they are so long that they could not be published again.
pub(in crate::broker) const UNREADABLE: &str = "tidings-unreadable";
/// The bytes before the properties: class, weight and length of the body.
const FIXED_BYTES: usize = 12;
/// The flag of the property `headers`.
const HEADERS_FLAG: u16 = 1 << 13;

/// A payload in place of this payload of a header frame, if the library could not read it, or could not publish it
/// again in frames of `max_frame_bytes`; `None` = it can. A payload that is too short for the length of a body cannot
/// come from RabbitMQ; it passes, and the library closes the connection.
#[must_use]
pub fn replacement(payload: &[u8], max_frame_bytes: usize) -> Option<Vec<u8>> {
    let (fixed, properties) = payload.split_at_checked(FIXED_BYTES)?;
    let limit = max_frame_bytes.saturating_sub(RESERVED_BYTES);
    if payload.len() <= limit && is_readable(properties) {
        return None;
    }
    let carried = if payload.len() + RESERVED_BYTES <= limit { properties } else { &[] };
    let long = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes(), bytes].concat();
    let name = [&[u8::try_from(UNREADABLE.len()).unwrap_or(u8::MAX)], UNREADABLE.as_bytes()].concat();
    let table = long(&[&name[..], b"x", &long(carried)].concat());
    Some([fixed, &HEADERS_FLAG.to_be_bytes(), &table].concat())
}

/// Whether these bytes, the flags and the properties, are as the AMQP specification and RabbitMQ define them.
fn is_readable(properties: &[u8]) -> bool {
    let mut rest = Unread(properties);
    let Some(flags) = rest.take(2).map(|flags| u16::from_be_bytes([flags[0], flags[1]])) else { return false };
    // From the highest bit: content type and encoding, headers, delivery mode, priority, correlation id, reply-to,
    // expiration, message id, timestamp, type, user, application, cluster. The two lowest bits say that more flags
    // follow.
    let read = (2..16).rev().filter(|bit| flags & (1 << bit) != 0).try_for_each(|bit| match bit {
        13 => rest.skip_table(0),
        12 | 11 => rest.take(1).map(drop),
        6 => rest.take(8).map(drop),
        _ => rest.skip_short_string(),
    });
    let no_more_follow = flags.trailing_zeros() >= 2;
    read.is_some() && no_more_follow && rest.0.is_empty()
}

/// The bytes that were not read yet. Each method skips one element, or returns `None` if the bytes are not such an
/// element.
struct Unread<'a>(&'a [u8]);

impl<'a> Unread<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn skip_short_string(&mut self) -> Option<()> {
        let length = self.take(1)?[0];
        str::from_utf8(self.take(length.into())?).ok().map(drop)
    }

    /// The contents of a long string, a table or an array, whose length comes first.
    fn take_long(&mut self) -> Option<&'a [u8]> {
        let length = self.take(4)?.try_into().ok().map(u32::from_be_bytes)?;
        self.take(length as usize)
    }

    fn skip_table(&mut self, depth: usize) -> Option<()> {
        let mut entries = Unread(self.take_long()?);
        while !entries.0.is_empty() {
            entries.skip_short_string()?;
            entries.skip_value(depth)?;
        }
        Some(())
    }

    fn skip_value(&mut self, depth: usize) -> Option<()> {
        if depth == MAX_DEPTH {
            return None;
        }
        // RabbitMQ's types, which differ from those of the specification.
        let length = match self.take(1)?[0] {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'u' | b'U' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'l' | b'L' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.take_long().map(drop),
            b'F' => return self.skip_table(depth + 1),
            b'A' => {
                let mut values = Unread(self.take_long()?);
                while !values.0.is_empty() {
                    values.skip_value(depth + 1)?;
                }
                return Some(());
            }
            _ => return None,
        };
        self.take(length).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, parse_frame};
    use proptest::prelude::*;

    use super::*;

    /// The properties of a message whose header table has these bytes as its only entry.
    fn with_header(entry: &[u8]) -> Vec<u8> {
        let length = u32::try_from(entry.len()).expect("short").to_be_bytes();
        [&HEADERS_FLAG.to_be_bytes()[..], &length, entry].concat()
    }

    /// Properties with one header, in which arrays are nested to this depth.
    fn nested(depth: usize) -> Vec<u8> {
        let mut value = b"V".to_vec();
        for _ in 1..depth {
            value = [&b"A"[..], &u32::try_from(value.len()).expect("short").to_be_bytes(), &value].concat();
        }
        with_header(&[&b"\x01n"[..], &value].concat())
    }

    #[test]
    fn only_properties_that_the_library_can_read_are_readable() {
        assert!(is_readable(&[0, 0]));
        assert!(is_readable(&nested(MAX_DEPTH)));
        assert!(!is_readable(&nested(MAX_DEPTH + 1)));
        assert!(!is_readable(&nested(20_000)));
        assert!(!is_readable(&with_header(b"\x01\xffV")), "a name that is not UTF-8");
        assert!(!is_readable(&with_header(b"\x01n?")), "a type that does not exist");
        assert!(!is_readable(&with_header(b"\x01nI\0\0")), "a number that is cut off");
        assert!(!is_readable(&[0, 1]), "more flags");
        assert!(!is_readable(&[0x80, 0, 1, 0xff]), "a content type that is not UTF-8");
        assert!(!is_readable(&[0, 0, 0]), "something after the end");
    }

    #[test]
    fn unreadable_properties_are_carried_unless_they_are_too_long_to_be_published_again() {
        let payload = |length: usize| [&[7; FIXED_BYTES][..], &with_header(&vec![0xff; length])].concat();
        let carried = replacement(&payload(1_000), 4_096).expect("a replacement");
        assert_eq!(&carried[..FIXED_BYTES], &[7; FIXED_BYTES]);
        assert!(is_readable(&carried[FIXED_BYTES..]));
        assert!(carried.ends_with(&with_header(&vec![0xff; 1_000])));
        let cut = replacement(&payload(3_800), 4_096).expect("a replacement");
        assert!(cut.len() < 64 && is_readable(&cut[FIXED_BYTES..]));
    }

    /// The contents with their length before them.
    fn long(contents: &[u8]) -> Vec<u8> {
        [&u32::try_from(contents.len()).expect("short").to_be_bytes(), contents].concat()
    }

    /// The entries of a table.
    fn entries(value: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(("[a-z-]{0,9}", value), 0..5).prop_map(|entries| {
            let entry = |(name, value): (String, Vec<u8>)| {
                [&[u8::try_from(name.len()).expect("short")], name.as_bytes(), &value].concat()
            };
            entries.into_iter().flat_map(entry).collect()
        })
    }

    /// A value of any type.
    fn value() -> impl Strategy<Value = Vec<u8>> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..20);
        let of = |types: &'static [u8], length: usize| {
            let contents = proptest::collection::vec(any::<u8>(), length);
            (proptest::sample::select(types), contents).prop_map(|(kind, contents)| [&[kind], &contents[..]].concat())
        };
        let flat = prop_oneof![
            of(b"V", 0),
            of(b"tbB", 1),
            of(b"suU", 2),
            of(b"Iif", 4),
            of(b"D", 5),
            of(b"lLdT", 8),
            (proptest::sample::select(&b"Sx"[..]), bytes())
                .prop_map(|(kind, bytes)| [&[kind], &long(&bytes)[..]].concat()),
        ];
        flat.prop_recursive(6, 40, 5, |value| {
            prop_oneof![
                entries(value.clone()).prop_map(|entries| [b"F", &long(&entries)[..]].concat()),
                proptest::collection::vec(value, 0..5).prop_map(|values| [b"A", &long(&values.concat())[..]].concat()),
            ]
        })
    }

    /// Whether the library can read a header frame with this payload.
    fn library_reads(payload: &[u8]) -> bool {
        let frame = [&[2, 0, 1][..], &long(payload), &[0xCE]].concat();
        matches!(parse_frame(&frame[..]), Ok(([], AMQPFrame::Header(..))))
    }

    proptest! {
        #[test]
        fn the_library_can_read_what_the_guard_makes_of_any_bytes(
            properties in proptest::collection::vec(any::<u8>(), 0..600),
            max_frame_bytes in prop_oneof![Just(131_072), 0..2_000_usize],
        ) {
            let payload = [&[0; FIXED_BYTES][..], &properties].concat();
            let read = replacement(&payload, max_frame_bytes).unwrap_or(payload);
            prop_assert!(is_readable(&read[FIXED_BYTES..]));
            prop_assert!(library_reads(&read));
        }

        #[test]
        fn headers_of_every_type_pass_and_damaged_ones_are_replaced_if_the_library_cannot_read_them(
            entries in entries(value()),
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut payload = [&[0; FIXED_BYTES][..], &with_header(&entries)].concat();
            prop_assert_eq!(replacement(&payload, 131_072), None);
            prop_assert!(library_reads(&payload));
            for (at, byte) in damage {
                let at = FIXED_BYTES + at.index(payload.len() - FIXED_BYTES);
                payload[at] = byte;
            }
            let read = replacement(&payload, 131_072).unwrap_or(payload);
            prop_assert!(library_reads(&read));
        }

        #[test]
        fn a_payload_too_short_for_a_header_frame_passes_and_the_library_refuses_it(
            payload in proptest::collection::vec(any::<u8>(), 0..FIXED_BYTES),
        ) {
            prop_assert_eq!(replacement(&payload, 131_072), None);
            prop_assert!(!library_reads(&payload));
        }
    }
}
