//! An error and its causes, in one sentence. No I/O.

use std::error::Error;
use std::fmt::Write as _;

/// The error and its causes, separated by colons. A cause is left out if the text before it ends with the same words, as
/// errors of some libraries do.
#[must_use]
pub fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let text = next.to_string();
        if !sentence.ends_with(&text) {
            let _ = write!(sentence, ": {text}");
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
    struct TestError(&'static str, #[source] Option<Box<TestError>>);

    #[test]
    fn each_cause_appears_once() {
        let error = |words, cause: Option<TestError>| TestError(words, cause.map(Box::new));
        let database = error("relation exists", None);
        let sqlx = error("error returned from database: relation exists", Some(database));
        let migrate = error("while executing migration 2: error returned from database: relation exists", Some(sqlx));
        let ours = error("could not migrate", Some(migrate));
        assert_eq!(
            error_chain(&ours),
            "could not migrate: while executing migration 2: error returned from database: relation exists"
        );
        assert_eq!(error_chain(&error("a", Some(error("b", None)))), "a: b");
    }
}
