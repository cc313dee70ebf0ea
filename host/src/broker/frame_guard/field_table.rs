//! Whether the client library can read the header of a message, decided without reading it: no deep recursion, nothing
//! allocated.

/// How deep tables and arrays may lie in each other. `x-death` needs three; within a thousand the library overflows its
/// stack.
const DEEPEST: usize = 32;
/// What we may have to add to the headers of a letter that is parked, in bytes.
pub(in crate::broker) const ROOM: usize = 512;
/// The header that stands for what cannot be read, and carries it as it came: the flags, then the properties. Empty if
/// that is so long that nobody can publish it again.
pub(in crate::broker) const UNREADABLE: &str = "tidings-unreadable";
/// Class, weight and length of the body.
const FIXED: usize = 12;
const HEADERS: u16 = 1 << 13;

/// What the library is given in place of this payload of a header frame, if it cannot read it, or could not send it on
/// within frames of `longest` bytes. `None` = it can. A payload without room for the length of a body is no broker's, and
/// passes: the library hangs up at it.
#[must_use]
pub fn instead(payload: &[u8], longest: usize) -> Option<Vec<u8>> {
    let (fixed, properties) = payload.split_at_checked(FIXED)?;
    let limit = longest.saturating_sub(ROOM);
    if payload.len() <= limit && are_readable(properties) {
        return None;
    }
    let carried = if payload.len() + ROOM <= limit { properties } else { &[] };
    let long = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes(), bytes].concat();
    let name = [&[u8::try_from(UNREADABLE.len()).unwrap_or(u8::MAX)], UNREADABLE.as_bytes()].concat();
    let table = long(&[&name[..], b"x", &long(carried)].concat());
    Some([fixed, &HEADERS.to_be_bytes(), &table].concat())
}

/// Flags and properties, each as the specification and RabbitMQ have it.
fn are_readable(properties: &[u8]) -> bool {
    let mut rest = Bytes(properties);
    let Some(flags) = rest.take(2).map(|flags| u16::from_be_bytes([flags[0], flags[1]])) else { return false };
    // From the highest bit: content type and encoding, headers, delivery mode, priority, correlation id, reply-to,
    // expiration, message id, timestamp, type, user, application, cluster. The lowest bits would say that more follow.
    let read = (2..16).rev().filter(|bit| flags & (1 << bit) != 0).try_for_each(|bit| match bit {
        13 => rest.table(0),
        12 | 11 => rest.take(1).map(drop),
        6 => rest.take(8).map(drop),
        _ => rest.short_string(),
    });
    let no_more_follow = flags.trailing_zeros() >= 2;
    read.is_some() && no_more_follow && rest.0.is_empty()
}

/// Bytes that were not looked at yet. Each method steps over one thing, or says that it is not there.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn short_string(&mut self) -> Option<()> {
        let length = self.take(1)?[0];
        str::from_utf8(self.take(length.into())?).ok().map(drop)
    }

    /// The contents of a long string, a table or an array.
    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.take(4)?.try_into().ok().map(u32::from_be_bytes)?;
        self.take(length as usize)
    }

    fn table(&mut self, depth: usize) -> Option<()> {
        let mut entries = Bytes(self.long()?);
        while !entries.0.is_empty() {
            entries.short_string()?;
            entries.value(depth)?;
        }
        Some(())
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        if depth == DEEPEST {
            return None;
        }
        // The types of RabbitMQ, which differ from the specification's.
        let length = match self.take(1)?[0] {
            b'V' => 0,
            b't' | b'b' | b'B' => 1,
            b's' | b'u' | b'U' => 2,
            b'I' | b'i' | b'f' => 4,
            b'D' => 5,
            b'l' | b'L' | b'd' | b'T' => 8,
            b'S' | b'x' => return self.long().map(drop),
            b'F' => return self.table(depth + 1),
            b'A' => {
                let mut values = Bytes(self.long()?);
                while !values.0.is_empty() {
                    values.value(depth + 1)?;
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

    /// The properties of a message with one header.
    fn with_header(entry: &[u8]) -> Vec<u8> {
        let length = u32::try_from(entry.len()).expect("short").to_be_bytes();
        [&HEADERS.to_be_bytes()[..], &length, entry].concat()
    }

    fn nested(depth: usize) -> Vec<u8> {
        let mut value = b"V".to_vec();
        for _ in 1..depth {
            value = [&b"A"[..], &u32::try_from(value.len()).expect("short").to_be_bytes(), &value].concat();
        }
        with_header(&[&b"\x01n"[..], &value].concat())
    }

    #[test]
    fn what_the_library_can_read_is_readable_and_what_it_cannot_is_not() {
        assert!(are_readable(&[0, 0]));
        assert!(are_readable(&nested(DEEPEST)));
        assert!(!are_readable(&nested(DEEPEST + 1)));
        assert!(!are_readable(&nested(20_000)));
        assert!(!are_readable(&with_header(b"\x01\xffV")), "a name that is not UTF-8");
        assert!(!are_readable(&with_header(b"\x01n?")), "a type that there is not");
        assert!(!are_readable(&with_header(b"\x01nI\0\0")), "a number that is cut off");
        assert!(!are_readable(&[0, 1]), "more flags");
        assert!(!are_readable(&[0x80, 0, 1, 0xff]), "a content type that is not UTF-8");
        assert!(!are_readable(&[0, 0, 0]), "something after the end");
    }

    #[test]
    fn what_cannot_be_read_is_carried_as_long_as_it_can_be_sent_on() {
        let payload = |length: usize| [&[7; FIXED][..], &with_header(&vec![0xff; length])].concat();
        let carried = instead(&payload(1_000), 4_096).expect("it cannot be read");
        assert_eq!(&carried[..FIXED], &[7; FIXED]);
        assert!(are_readable(&carried[FIXED..]));
        assert!(carried.ends_with(&with_header(&vec![0xff; 1_000])));
        let cut = instead(&payload(3_800), 4_096).expect("it cannot be read");
        assert!(cut.len() < 64 && are_readable(&cut[FIXED..]));
    }

    /// The contents behind their length.
    fn long(contents: &[u8]) -> Vec<u8> {
        [&u32::try_from(contents.len()).expect("short").to_be_bytes(), contents].concat()
    }

    /// One entry of a table after the other.
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

    /// What the library makes of a frame with this payload.
    fn library_reads(payload: &[u8]) -> bool {
        let frame = [&[2, 0, 1][..], &long(payload), &[0xCE]].concat();
        matches!(parse_frame(&frame[..]), Ok(([], AMQPFrame::Header(..))))
    }

    proptest! {
        #[test]
        fn whatever_comes_the_library_gets_something_that_it_can_read(
            properties in proptest::collection::vec(any::<u8>(), 0..600),
            longest in prop_oneof![Just(131_072), 0..2_000_usize],
        ) {
            let payload = [&[0; FIXED][..], &properties].concat();
            let read = instead(&payload, longest).unwrap_or(payload);
            prop_assert!(are_readable(&read[FIXED..]));
            prop_assert!(library_reads(&read));
        }

        #[test]
        fn headers_of_every_type_pass_and_what_is_damaged_in_them_is_replaced_if_the_library_cannot_read_it(
            entries in entries(value()),
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut payload = [&[0; FIXED][..], &with_header(&entries)].concat();
            prop_assert_eq!(instead(&payload, 131_072), None);
            prop_assert!(library_reads(&payload));
            for (at, byte) in damage {
                let at = FIXED + at.index(payload.len() - FIXED);
                payload[at] = byte;
            }
            let read = instead(&payload, 131_072).unwrap_or(payload);
            prop_assert!(library_reads(&read));
        }

        #[test]
        fn what_is_shorter_than_a_header_frame_passes_and_the_library_refuses_it(
            payload in proptest::collection::vec(any::<u8>(), 0..FIXED),
        ) {
            prop_assert_eq!(instead(&payload, 131_072), None);
            prop_assert!(!library_reads(&payload));
        }
    }
}
