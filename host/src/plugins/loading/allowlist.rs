//! The list of what may serve: `allowed.sha256` in the plugin directory, as `sha256sum *.wasm` writes it. It goes by the
//! digests; the names are for people. Without the file anything may serve, and with one that cannot be read nothing new.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::plugins::loading::load_error::LoadError;
use crate::plugins::loading::source::read;

/// The name of the list.
pub(in crate::plugins) const FILE: &str = "allowed.sha256";
/// Ten thousand lines.
const LIST_BYTES: u64 = 1024 * 1024;

/// The list of one plugin directory.
#[derive(Debug)]
pub struct Allowlist {
    file: PathBuf,
    /// In lower-case hexadecimal; `None` = there is no list.
    digests: Option<BTreeSet<String>>,
}

impl Allowlist {
    /// Reads the list of `dir`.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read or understood.
    pub fn read(dir: &Path) -> Result<Self, LoadError> {
        let file = dir.join(FILE);
        let unusable = |reason| LoadError::List { file: file.clone(), reason };
        let digests = match read(&file, LIST_BYTES) {
            // A link that leads nowhere is a list all the same.
            Err(LoadError::Read(error)) if error.kind() == ErrorKind::NotFound && !file.is_symlink() => None,
            Err(error) => return Err(unusable(error.to_string())),
            Ok(bytes) => Some(parse(&String::from_utf8_lossy(&bytes)).map_err(unusable)?),
        };
        Ok(Self { file, digests })
    }

    /// Sees whether what has this SHA-256, in lower-case hexadecimal, may serve as `name`.
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

/// The digests in the text of a list; else why it cannot be understood.
fn parse(text: &str) -> Result<BTreeSet<String>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            digest(line).ok_or_else(|| format!("line {} is not a digest, two spaces and a name", number + 1))
        })
        .collect()
}

/// The digest at the beginning of a line that `sha256sum` may have written.
fn digest(line: &str) -> Option<String> {
    // It puts a \ before lines whose name has one in it, and a * instead of the second space before binary files.
    let (digest, name) = line.strip_prefix('\\').unwrap_or(line).split_once(' ')?;
    let whole = digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let named = name.strip_prefix([' ', '*']).is_some_and(|name| !name.is_empty());
    (whole && named).then(|| digest.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_sha256sum_writes_is_understood_and_what_it_does_not_is_not() {
        let one = "0123456789abcdef".repeat(4);
        let upper = one.to_uppercase();
        for line in [format!("{one}  a.wasm"), format!("{upper} *a b.wasm"), format!("\\{one}  a\\\\b.wasm")] {
            assert_eq!(digest(&line).as_deref(), Some(&*one), "{line}");
        }
        for line in [&one, &format!("{one} "), &format!("{one}  "), &format!("{one}0  a"), &one[1..], "x  a", " "] {
            assert_eq!(digest(line), None, "{line:?}");
        }
        let text = format!("# checked by Ada\n\n{one}  a.wasm\r\n");
        assert_eq!(parse(&text), Ok(BTreeSet::from([one.clone()])));
        assert!(parse(&format!("{text}SHA256 (a.wasm) = {one}")).expect_err("another format").contains("line 4"));
    }

    proptest! {
        #[test]
        fn a_list_is_understood_line_by_line_or_not_at_all(lines in proptest::collection::vec("[0-9a-f]{62,65} [ *]?[a-z]{0,2}", 0..6)) {
            let well = |line: &String| line.len() > 66 && &line[64..65] == " " && matches!(&line[65..66], " " | "*");
            let digests = parse(&lines.join("\n"));
            prop_assert_eq!(digests.is_ok(), lines.iter().all(well), "{:?}", digests);
        }
    }
}
