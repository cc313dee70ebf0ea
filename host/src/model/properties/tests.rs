//! Headers and properties survive their form as JSON, of every type of AMQP.

use proptest::prelude::*;

use super::*;

/// A value of any type.
pub(crate) fn value() -> impl Strategy<Value = HeaderValue> {
    let flat = prop_oneof![
        Just(HeaderValue::Void),
        any::<bool>().prop_map(HeaderValue::Boolean),
        any::<i8>().prop_map(HeaderValue::I8),
        any::<u8>().prop_map(HeaderValue::U8),
        any::<i16>().prop_map(HeaderValue::I16),
        any::<u16>().prop_map(HeaderValue::U16),
        any::<i32>().prop_map(HeaderValue::I32),
        any::<u32>().prop_map(HeaderValue::U32),
        any::<i64>().prop_map(HeaderValue::Number),
        // Not a number is not equal to itself.
        any::<f32>().prop_filter("a number", |number| !number.is_nan()).prop_map(HeaderValue::F32),
        any::<f64>().prop_filter("a number", |number| !number.is_nan()).prop_map(HeaderValue::F64),
        (any::<u8>(), any::<u32>()).prop_map(|(scale, value)| HeaderValue::Decimal { scale, value }),
        any::<u64>().prop_map(HeaderValue::Timestamp),
        "(.|\n|\0){0,20}".prop_map(HeaderValue::Text),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(HeaderValue::Bytes),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(|bytes| match String::from_utf8(bytes) {
            Ok(text) => HeaderValue::Text(text),
            Err(error) => HeaderValue::Binary(error.into_bytes()),
        }),
    ];
    flat.prop_recursive(4, 24, 4, |value| {
        prop_oneof![
            proptest::collection::vec(value.clone(), 0..4).prop_map(HeaderValue::Array),
            proptest::collection::btree_map("[a-z\"\\\\ \u{e9}]{0,9}", value, 0..4).prop_map(HeaderValue::Table),
        ]
    })
}

/// Headers whose names a publisher may choose.
pub(crate) fn headers() -> impl Strategy<Value = Headers> {
    proptest::collection::btree_map("[a-z\"\\\\ \u{e9}-]{0,12}", value(), 0..6)
}

fn text() -> impl Strategy<Value = Option<String>> {
    proptest::option::of("(\\PC|\0){0,20}")
}

prop_compose! {
    pub(crate) fn properties()(
        texts in proptest::collection::vec(text(), 9),
        delivery_mode in any::<Option<u8>>(),
        priority in any::<Option<u8>>(),
        timestamp in any::<Option<u64>>(),
    ) -> Properties {
        let mut texts = texts.into_iter();
        let mut text = || texts.next().flatten();
        Properties {
            content_type: text(),
            content_encoding: text(),
            delivery_mode,
            priority,
            correlation_id: text(),
            reply_to: text(),
            message_id: text(),
            timestamp,
            kind: text(),
            user_id: text(),
            app_id: text(),
            cluster_id: text(),
        }
    }
}

proptest! {
    #[test]
    fn properties_and_headers_of_every_type_are_read_from_their_json_as_they_were(
        properties in properties(),
        headers in headers(),
    ) {
        let (written, written_headers) = (properties.to_json(), headers_to_json(&headers));
        let text = serde_json::to_string(&(&written, &written_headers)).expect("JSON");
        prop_assert!(!text.contains("\\u0000"), "PostgreSQL cannot store it: {}", text);
        let (read, read_headers): (Map<String, Value>, Map<String, Value>) = serde_json::from_str(&text).expect("JSON");
        prop_assert_eq!(Properties::from_json(&read), Ok(properties));
        prop_assert_eq!(headers_of_json(&read_headers), Ok(headers));
    }

    #[test]
    fn any_json_is_headers_or_an_error(text in "[\\[\\]{}\",:a-z0-9.eE-]{0,60}") {
        if let Ok(Value::Object(object)) = serde_json::from_str(&text) {
            let _ = (headers_of_json(&object), Properties::from_json(&object));
        }
    }
}

#[test]
fn a_value_that_cannot_be_a_header_is_an_error_that_names_it() {
    let refused = |json: &str| {
        let object: Map<String, Value> = serde_json::from_str(json).expect("an object");
        headers_of_json(&object).expect_err(json).to_string()
    };
    assert_eq!(refused(r#"{"n": {"i8": 200}}"#), r#"the header "n" has no value of the type "i8""#);
    assert_eq!(refused(r#"{"n": {"u64": 1}}"#), r#"the header "n" has no value of the type "u64""#);
    assert_eq!(
        refused(r#"{"n": {"a": 1, "b": 2}}"#),
        r#"the header "n" is an object of 2 members; write a table as {"table": {…}}"#
    );
    assert_eq!(refused(r#"{"n": 18446744073709551615}"#), r#"the header "n" is a number of more than 64 bits"#);
    assert!(refused(&format!(r#"{{"{}": 1}}"#, "n".repeat(256))).contains("256 bytes"));
    let deep = format!(r#"{{"n": {}1{}}}"#, "[".repeat(40), "]".repeat(40));
    assert_eq!(refused(&deep), r#"the header "n" is nested deeper than 32 levels"#);
    let property = |json: &str| {
        let object: Map<String, Value> = serde_json::from_str(json).expect("an object");
        Properties::from_json(&object).expect_err(json).to_string()
    };
    assert_eq!(property(r#"{"priority": 256}"#), "the property priority is 256, which is not a number from 0 to 255");
    assert_eq!(property(r#"{"expiration": "1"}"#), r#""expiration" is not a property of a message that can be set"#);
}

#[test]
fn json_without_types_is_read_as_people_write_it() {
    let object: Map<String, Value> = serde_json::from_str(
        r#"{"text": "a", "whole": 7, "fraction": 1.5, "yes": true, "none": null, "list": [1, "a"]}"#,
    )
    .expect("an object");
    let expected = [
        ("text", HeaderValue::Text("a".into())),
        ("whole", HeaderValue::Number(7)),
        ("fraction", HeaderValue::F64(1.5)),
        ("yes", HeaderValue::Boolean(true)),
        ("none", HeaderValue::Void),
        ("list", HeaderValue::Array(vec![HeaderValue::Number(7 - 6), HeaderValue::Text("a".into())])),
    ];
    assert_eq!(headers_of_json(&object), Ok(expected.map(|(name, value)| (name.to_owned(), value)).into()));
}
