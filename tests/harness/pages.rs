//! The pages of the documentation, and a [`Reader`] that runs their blocks in order, as a user would type them. The
//! words after the language in a block's fence, which are not rendered, say what to do with the block:
//!
//! - `sh`, `sql`: run by a shell or by `psql`. With `again`, the block is repeated until its output matches the next
//!   block; with `exits=1`, it must end with that code; with `daemon`, its last line is `tidings run`, which keeps
//!   running during the following blocks.
//! - `text`: the expected output of the previous block. Its lines must occur in the output in this order; numbers, ids
//!   and times may differ, and … stands for any text.
//! - `text picture`: a diagram, which nothing shows.
//! - any other language, with the name of a file: the content of that file.

mod reader;
mod shape;

use std::fs;

use crate::repository;

pub use reader::Reader;
pub use shape::find_missing_line;

/// A page of the documentation.
#[derive(Debug)]
pub struct Page {
    /// The path of the page in the repository.
    pub path: &'static str,
    text: String,
}

/// A fenced block of a page.
#[derive(Clone, Debug)]
pub struct Block {
    /// The line at which it begins.
    pub line: usize,
    /// The first word after the fence.
    pub language: String,
    /// The other words after the fence.
    pub marks: Vec<String>,
    /// The content of the block.
    pub text: String,
}

/// A command that the tests cannot run here, and the file that runs it.
#[derive(Clone, Copy, Debug)]
pub struct ExternalCommand {
    /// The command as it stands in the pages.
    pub command: &'static str,
    /// The file that runs the command.
    pub file: &'static str,
    /// The text with which that file runs it.
    pub text: &'static str,
    /// What the tests do instead.
    pub substitute: Substitute,
}

/// What the tests do instead of a command that they cannot run.
#[derive(Clone, Copy, Debug)]
pub enum Substitute {
    /// Nothing.
    Nothing,
    /// Run this command.
    Shell(&'static str),
    /// Start the daemon and the example consumer.
    Deployment,
}

impl Page {
    /// Reads the page.
    ///
    /// # Panics
    ///
    /// When the file cannot be read.
    #[must_use]
    pub fn read(path: &'static str) -> Self {
        let text = fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { path, text }
    }

    /// The blocks of the page, in order.
    ///
    /// # Panics
    ///
    /// When a block has no end.
    #[must_use]
    pub fn blocks(&self) -> Vec<Block> {
        let (mut blocks, mut open): (Vec<Block>, Option<Block>) = (Vec::new(), None);
        for (number, line) in self.text.lines().enumerate() {
            match (line.strip_prefix("```"), open.as_mut()) {
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(info), None) => {
                    let mut words = info.split_whitespace().map(str::to_owned);
                    let language = words.next().unwrap_or_default();
                    open = Some(Block { line: number + 1, language, marks: words.collect(), text: String::new() });
                }
                (None, Some(block)) => block.text.extend([line, "\n"]),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{}: the last block has no end", self.path);
        blocks
    }

    /// The lines outside of blocks, with their numbers.
    #[must_use]
    pub fn prose(&self) -> Vec<(usize, &str)> {
        let mut inside = false;
        let outside = self.text.lines().enumerate().filter(|(_, line)| {
            let fence = line.starts_with("```");
            inside ^= fence;
            !fence && !inside
        });
        outside.map(|(number, line)| (number + 1, line)).collect()
    }

    /// The texts between backticks, with their line numbers.
    #[must_use]
    pub fn code(&self) -> Vec<(usize, &str)> {
        let mut code = Vec::new();
        for (number, line) in self.prose() {
            code.extend(line.split('`').skip(1).step_by(2).map(|code| (number, code)));
        }
        code
    }

    /// The targets of the links, with their line numbers.
    #[must_use]
    pub fn links(&self) -> Vec<(usize, &str)> {
        let mut links = Vec::new();
        for (number, line) in self.prose() {
            links.extend(line.split("](").skip(1).filter_map(|rest| Some((number, rest.split_once(')')?.0))));
        }
        links
    }

    /// The anchors that GitHub makes for the headings.
    #[must_use]
    pub fn anchors(&self) -> Vec<String> {
        let headings = self.prose().into_iter().filter(|(_, line)| line.starts_with('#'));
        headings
            .map(|(_, line)| {
                let text = line.trim_start_matches('#').trim().to_lowercase();
                let kept = text.chars().filter(|char| char.is_alphanumeric() || matches!(char, ' ' | '-' | '_'));
                kept.map(|char| if char == ' ' { '-' } else { char }).collect()
            })
            .collect()
    }

    /// The whole text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl Block {
    /// Whether `mark` stands after the fence.
    #[must_use]
    pub fn has_mark(&self, mark: &str) -> bool {
        self.marks.iter().any(|other| other == mark)
    }

    /// The commands, one for each line; continued lines are joined.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.text.replace("\\\n", " ").lines().map(str::to_owned).collect()
    }
}

impl ExternalCommand {
    /// Whether `line` is this command, apart from a comment at its end.
    #[must_use]
    pub fn matches(&self, line: &str) -> bool {
        line.split("  #").next().is_some_and(|command| command.trim_end() == self.command)
    }
}
