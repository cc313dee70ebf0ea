//! Errors in the settings: each is a sentence that begins with the variable, and none contains a password.

use std::fmt;

use crate::model::secrets::SecretUrl;

/// All errors in the settings, one sentence each.
#[derive(Debug)]
pub struct ValidationErrors(pub(super) Vec<String>);

impl ValidationErrors {
    /// The sentences.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl From<&str> for ValidationErrors {
    fn from(sentence: &str) -> Self {
        Self(vec![sentence.to_owned()])
    }
}

impl FromIterator<String> for ValidationErrors {
    fn from_iter<I: IntoIterator<Item = String>>(sentences: I) -> Self {
        Self(sentences.into_iter().collect())
    }
}

impl fmt::Display for ValidationErrors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ValidationErrors {}

/// Returns the URL, or the list of URLs, in `value`. Adds an error if there is none, or `check` refuses it.
pub(super) fn check_url(
    name: &str,
    value: Option<String>,
    schemes: &[&str],
    errors: &mut Vec<String>,
    check: impl Fn(&SecretUrl) -> Result<(), String>,
) -> Option<SecretUrl> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        errors.push(format!("{name} is not set: give a URL that begins with {}", schemes[0]));
        return None;
    };
    if !schemes.iter().any(|scheme| value.starts_with(scheme)) {
        errors.push(format!("{name} does not begin with {}", schemes.join(" or ")));
        return None;
    }
    // A parser would read it as another URL, with a part of the password as the name of the database or virtual host.
    if split_urls(&value, schemes).any(|rest| after_authority(rest).contains('@')) {
        errors.push(format!(
            "{name} has an @ after the first /, ? or #: in a user name or a password, write %2F, %3F, %23 and %40 for these characters"
        ));
        return None;
    }
    let url = SecretUrl::from(value);
    match check(&url) {
        Ok(()) => Some(url),
        Err(error) => {
            errors.push(format!("{name} is not a URL that can be used: {error}"));
            None
        }
    }
}

/// Returns the number in `value`. Adds an error if it is not a whole number from `least` to `most`.
pub(super) fn parse_number(name: &str, value: &str, least: u32, most: u32, errors: &mut Vec<String>) -> Option<u32> {
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    if number.is_none() {
        errors.push(format!("{name} is {value:?}, which is not a whole number from {least} to {most}"));
    }
    number
}

/// Returns the meaning of the word in `value`. Adds an error if it is neither of the two words.
pub(super) fn parse_word<T>(name: &str, value: &str, words: [(&str, T); 2], errors: &mut Vec<String>) -> Option<T> {
    let [first, second] = words;
    match value {
        word if word == first.0 => Some(first.1),
        word if word == second.0 => Some(second.1),
        other => {
            errors.push(format!("{name} is {other:?}, which is neither {} nor {}", first.0, second.0));
            None
        }
    }
}

/// What follows the scheme of each URL of a list: one begins at the beginning, and after a comma.
fn split_urls<'a>(value: &'a str, schemes: &'a [&str]) -> impl Iterator<Item = &'a str> {
    let is_start = |at: usize| at == 0 || value[..at].trim_end().ends_with(',');
    let after_scheme =
        |at: usize| schemes.iter().find_map(|scheme| value[at..].strip_prefix(scheme)).map(|rest| (at, rest));
    let urls: Vec<(usize, &str)> =
        value.char_indices().filter(|(at, _)| is_start(*at)).filter_map(|(at, _)| after_scheme(at)).collect();
    let ends: Vec<usize> = urls.iter().skip(1).map(|(at, _)| *at).chain([value.len()]).collect();
    urls.into_iter().zip(ends).map(move |((_, rest), end)| &rest[..end - (value.len() - rest.len())])
}

/// The part of a URL after user, password, host and port.
fn after_authority(rest: &str) -> &str {
    rest.find(['/', '?', '#']).map_or("", |end| &rest[end..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks a URL of PostgreSQL.
    fn check_postgres_url(text: &str) -> Result<SecretUrl, String> {
        let mut errors = Vec::new();
        let url =
            check_url("TIDINGS_URL", Some(text.to_owned()), &["postgres://"], &mut errors, crate::store::check_url);
        url.ok_or_else(|| errors.concat())
    }

    #[test]
    fn a_url_with_a_separator_in_its_password_is_refused() {
        for password in ["12/secret", "12?secret", "12#secret", "/", "//secret", "://secret"] {
            let error = check_postgres_url(&format!("postgres://user:{password}@host/database")).expect_err(password);
            assert!(error.contains("write %2F") && !error.contains("secret"), "{error}");
        }
        for text in [
            "postgres://u:1%2F2@host/d?sslmode=disable",
            "postgres://u:a@b@host",
            "postgres:///d?host=/run",
            "postgres://u:p@a:1,b:2/d",
        ] {
            assert_eq!(check_postgres_url(text).as_ref().map(SecretUrl::expose), Ok(text));
        }
    }

    proptest! {
        #[test]
        fn a_value_is_a_number_within_the_limits_or_an_error_that_names_the_variable(
            value in ".{0,12}|[+-]?[0-9]{1,12}",
            least in 0..1_000_u32,
            more in any::<u16>(),
        ) {
            let (most, mut errors) = (least + u32::from(more), Vec::new());
            match parse_number("TIDINGS_NUMBER", &value, least, most, &mut errors) {
                Some(number) => prop_assert!((least..=most).contains(&number) && errors.is_empty()),
                None => prop_assert!(errors.len() == 1 && errors[0].starts_with("TIDINGS_NUMBER is \"")),
            }
        }
    }
}
