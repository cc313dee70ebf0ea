//! What went wrong and why, in one sentence: an error and what it was caused by, each once. No I/O.

use std::error::Error;
use std::fmt::Write as _;

/// The error and its error_chain, separated by colons. Libraries repeat the words of a cause at the end of their own; nobody
/// needs to read them twice.
#[must_use]
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !sentence.ends_with(&words) {
            let _ = write!(sentence, ": {words}");
        }
        cause = next.source();
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Says(&'static str, #[source] Option<Box<Says>>);

    #[test]
    fn each_cause_is_said_once() {
        let says = |words, cause: Option<Says>| Says(words, cause.map(Box::new));
        let database = says("relation exists", None);
        let sqlx = says("error returned from database: relation exists", Some(database));
        let migrate = says("while executing migration 2: error returned from database: relation exists", Some(sqlx));
        let ours = says("could not migrate", Some(migrate));
        assert_eq!(
            error_chain(&ours),
            "could not migrate: while executing migration 2: error returned from database: relation exists"
        );
        assert_eq!(error_chain(&says("a", Some(says("b", None)))), "a: b");
    }
}
