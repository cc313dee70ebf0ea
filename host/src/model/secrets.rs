//! Values that must never be logged or shown: URLs with a password, and the token with which a person acts on the page. No I/O.

use std::fmt;

use subtle::ConstantTimeEq as _;

/// A URL that may contain a password.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL as it was given, with its password. Must not be logged or shown.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for SecretUrl {
    fn from(url: String) -> Self {
        Self(url)
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretUrl(…)")
    }
}

/// Fewer characters could be guessed.
const SHORTEST: usize = 16;
/// A longer text is probably not the token but an error.
const LONGEST: usize = 256;

/// The token, as it was given.
#[derive(Clone)]
pub struct HttpToken(String);

impl HttpToken {
    /// Whether it is no token at all: an empty variable is one that is not set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is wrong with it, without a character of it.
    #[must_use]
    pub fn find_error(&self) -> Option<String> {
        let length = self.0.chars().count();
        if !self.0.bytes().all(|byte| byte.is_ascii_graphic()) {
            // A browser could not send it.
            Some("has a character that is not printable ASCII, or a space".into())
        } else if !(SHORTEST..=LONGEST).contains(&length) {
            Some(format!("has {length} characters; it needs {SHORTEST} to {LONGEST}, such as: openssl rand -hex 16"))
        } else {
            None
        }
    }

    /// Whether `given` is the same, in a time that tells nothing but the length.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl From<String> for HttpToken {
    fn from(token: String) -> Self {
        Self(token)
    }
}

impl fmt::Debug for HttpToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("HttpToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_long_enough_and_can_be_sent_and_never_shows() {
        for (good, text) in [
            (true, "0123456789abcdef".to_owned()),
            (true, "~!@#$%^&*()_+{}|:".to_owned()),
            (true, "a".repeat(256)),
            (false, "0123456789abcde".to_owned()),
            (false, "a".repeat(257)),
            (false, "0123456789 abcdef".to_owned()),
            (false, "0123456789äbcdefg".to_owned()),
            (false, "0123456789abcdef\n".to_owned()),
        ] {
            let token = HttpToken::from(text.clone());
            let error = token.find_error();
            assert_eq!(error.is_none(), good, "{text:?}: {error:?}");
            assert!(!format!("{token:?} {error:?}").contains(text.trim()), "{text:?}");
        }
    }

    #[test]
    fn only_the_same_token_is_right() {
        let token = HttpToken::from("0123456789abcdef".to_owned());
        assert!(token.is(b"0123456789abcdef"));
        for wrong in [&b""[..], b"0123456789abcdeF", b"0123456789abcde", b"0123456789abcdef0"] {
            assert!(!token.is(wrong));
        }
    }
}
