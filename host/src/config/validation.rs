//! What is wrong with the settings: every mistake is a sentence that names the variable, and none of them shows a password.

use std::fmt;

use crate::model::secret_url::SecretUrl;

/// What is wrong with the settings, a sentence each.
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

/// The URL in `value`, if it is there, and one that `check` takes.
pub(super) fn url(
    name: &str,
    value: Option<String>,
    schemes: &[&str],
    mistakes: &mut Vec<String>,
    check: impl Fn(&SecretUrl) -> Result<(), String>,
) -> Option<SecretUrl> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        mistakes.push(format!("{name} is not set: give a URL that begins with {}", schemes[0]));
        return None;
    };
    if !schemes.iter().any(|scheme| value.starts_with(scheme)) {
        mistakes.push(format!("{name} does not begin with {}", schemes.join(" or ")));
        return None;
    }
    // Taken as it is, it would be another URL, and a part of the password the name of its database or virtual host.
    if value.split_once("://").is_some_and(|(_, rest)| after_authority(rest).contains('@')) {
        mistakes.push(format!(
            "{name} has an @ behind the first /, ? or #: in a user, a password and whatever is not to separate, write %2F, %3F, %23 and %40 for these"
        ));
        return None;
    }
    let url = SecretUrl::from(value);
    match check(&url) {
        Ok(()) => Some(url),
        Err(error) => {
            mistakes.push(format!("{name} is not a URL that can be used: {error}"));
            None
        }
    }
}

/// The whole number in `value`, if it is one from `least` to `most`.
pub(super) fn number(name: &str, value: &str, least: u32, most: u32, mistakes: &mut Vec<String>) -> Option<u32> {
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    if number.is_none() {
        mistakes.push(format!("{name} is {value:?}, which is not a whole number from {least} to {most}"));
    }
    number
}

/// What is behind user, password, host and port.
fn after_authority(rest: &str) -> &str {
    rest.find(['/', '?', '#']).map_or("", |end| &rest[end..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes a URL of PostgreSQL's, or says what is wrong with it.
    fn taken(text: &str) -> Result<SecretUrl, String> {
        let mut mistakes = Vec::new();
        let url = url("TIDINGS_URL", Some(text.to_owned()), &["postgres://"], &mut mistakes, crate::store::check_url);
        url.ok_or_else(|| mistakes.concat())
    }

    #[test]
    fn a_url_whose_password_would_be_taken_for_something_else_is_refused() {
        for password in ["12/secret", "12?secret", "12#secret", "/"] {
            let mistake = taken(&format!("postgres://user:{password}@host/database")).expect_err(password);
            assert!(mistake.contains("write %2F") && !mistake.contains("secret"), "{mistake}");
        }
        for text in ["postgres://u:1%2F2@host/d?sslmode=disable", "postgres://u:a@b@host", "postgres:///d?host=/run"] {
            assert_eq!(taken(text).as_ref().map(SecretUrl::expose), Ok(text));
        }
    }

    proptest! {
        #[test]
        fn a_number_is_one_within_its_limits_or_a_sentence_that_names_the_place(
            value in ".{0,12}|[+-]?[0-9]{1,12}",
            least in 0..1_000_u32,
            more in any::<u16>(),
        ) {
            let (most, mut mistakes) = (least + u32::from(more), Vec::new());
            match number("TIDINGS_NUMBER", &value, least, most, &mut mistakes) {
                Some(number) => prop_assert!((least..=most).contains(&number) && mistakes.is_empty()),
                None => prop_assert!(mistakes.len() == 1 && mistakes[0].starts_with("TIDINGS_NUMBER is \"")),
            }
        }
    }
}
