//! The allowlist: the plugins that may serve. It is the file `allowed.sha256` in the plugin directory, in the format of
//! `sha256sum *.wasm`. Only the digests count; the names are for people. Without the file every plugin may serve. While
//! the file cannot be read, no new plugin may serve.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::read_stable_file;

/// The name of the list's file.
pub(in crate::plugins) const FILE_NAME: &str = "allowed.sha256";
/// A larger list is not read. This is room for more than ten thousand lines.
const MAX_LIST_BYTES: u64 = 1024 * 1024;

/// The allowlist of one plugin directory.
#[derive(Debug)]
pub struct Allowlist {
    file: PathBuf,
    /// The digests in lower-case hexadecimal; `None` = there is no list.
    digests: Option<BTreeSet<String>>,
}

impl Allowlist {
    /// Reads the list of `dir`.
    ///
    /// # Errors
    ///
    /// When the list exists, and cannot be read or has a line that is not understood.
    pub fn read(dir: &Path) -> Result<Self, LoadError> {
        let file = dir.join(FILE_NAME);
        let unusable = |reason| LoadError::List { file: file.clone(), reason };
        let digests = match read_stable_file(&file, MAX_LIST_BYTES) {
            // A symbolic link that leads nowhere is a list that cannot be read, rather than no list.
            Err(LoadError::Read(error)) if error.kind() == ErrorKind::NotFound && !file.is_symlink() => None,
            Err(error) => return Err(unusable(error.to_string())),
            Ok(bytes) => Some(parse_digests(&String::from_utf8_lossy(&bytes)).map_err(unusable)?),
        };
        Ok(Self { file, digests })
    }

    /// Checks that a file whose SHA-256 is `digest`, in lower-case hexadecimal, may serve. `name` is for the error
    /// alone.
    ///
    /// # Errors
    ///
    /// [`LoadError::NotAllowed`] when it may not, with the line that would allow it.
    pub fn check(&self, digest: &str, name: &str) -> Result<(), LoadError> {
        match &self.digests {
            Some(digests) if !digests.contains(digest) => {
                Err(LoadError::NotAllowed { list: self.file.clone(), line: format!("{digest}  {name}") })
            }
            _ => Ok(()),
        }
    }
}

/// Reads the digests in the text of a list. The error says which line is not understood.
fn parse_digests(text: &str) -> Result<BTreeSet<String>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            parse_digest(line).ok_or_else(|| format!("line {} is not a digest, two spaces and a name", number + 1))
        })
        .collect()
}

/// The digest at the beginning of a line in the format of `sha256sum`; `None` = the line has another format.
fn parse_digest(line: &str) -> Option<String> {
    // `sha256sum` begins a line with \ if the name contains one, and writes * instead of the second space for binary
    // files.
    let (digest, name) = line.strip_prefix('\\').unwrap_or(line).split_once(' ')?;
    let is_digest = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let has_name = name.strip_prefix([' ', '*']).is_some_and(|name| !name.is_empty());
    (is_digest && has_name).then(|| digest.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_in_the_format_of_sha256sum_are_understood_and_others_are_not() {
        let sha256 = "0123456789abcdef".repeat(4);
        let upper_case = sha256.to_uppercase();
        for line in [format!("{sha256}  a.wasm"), format!("{upper_case} *a b.wasm"), format!("\\{sha256}  a\\\\b.wasm")]
        {
            assert_eq!(parse_digest(&line).as_deref(), Some(&*sha256), "{line}");
        }
        for line in [
            &sha256,
            &format!("{sha256} "),
            &format!("{sha256}  "),
            &format!("{sha256}0  a"),
            &sha256[1..],
            "x  a",
            " ",
        ] {
            assert_eq!(parse_digest(line), None, "{line:?}");
        }
        let text = format!("# checked by Ada\n\n{sha256}  a.wasm\r\n");
        assert_eq!(parse_digests(&text), Ok(BTreeSet::from([sha256.clone()])));
        assert!(
            parse_digests(&format!("{text}SHA256 (a.wasm) = {sha256}")).expect_err("another format").contains("line 4")
        );
    }

    proptest! {
        #[test]
        fn a_list_is_accepted_only_if_every_line_is_well_formed(
            lines in proptest::collection::vec("[0-9a-f]{62,65} [ *]?[a-z]{0,2}", 0..6),
        ) {
            let is_well_formed =
                |line: &String| line.len() > 66 && &line[64..65] == " " && matches!(&line[65..66], " " | "*");
            let digests = parse_digests(&lines.join("\n"));
            prop_assert_eq!(digests.is_ok(), lines.iter().all(is_well_formed), "{:?}", digests);
        }
    }
}
