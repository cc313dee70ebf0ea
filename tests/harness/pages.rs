//! The pages of the documentation, and a reader who does what they say: each block of a page is run, in the order of the
//! page, as a person would type it. What a block is, its fence says behind the language, where no reader sees it:
//!
//! - `sh`, `sql`: a shell and `psql`. With `again`, until it comes to what is shown; with `exits=1`, it must end so; with
//!   `daemon`, it goes on beside what follows, and the block ends with `tidings run`.
//! - `text`: what the block before it shows. Its lines must be among what was written, in their order; numbers, ids and
//!   times are examples, and … stands for anything.
//! - any other, with the name of a file: what is in the file.

mod reader;
mod shape;

use std::fs;

use crate::repository;

pub use reader::Reader;
pub use shape::missing;

/// A page.
#[derive(Debug)]
pub struct Page {
    /// Where it lies in the repository.
    pub path: &'static str,
    text: String,
}

/// A block of a page.
#[derive(Clone, Debug)]
pub struct Block {
    /// Where it begins.
    pub line: usize,
    /// The first word behind its fence.
    pub language: String,
    /// The others.
    pub marks: Vec<String>,
    /// What is in it.
    pub text: String,
}

/// A command that cannot be run where the tests run, and what runs it.
#[derive(Clone, Copy, Debug)]
pub struct Elsewhere {
    /// The command, as the pages have it.
    pub command: &'static str,
    /// The file that runs it.
    pub runs: &'static str,
    /// What is written there.
    pub as_: &'static str,
    /// What comes to the same here.
    pub here: Here,
}

/// What comes to the same as a command that cannot be run.
#[derive(Clone, Copy, Debug)]
pub enum Here {
    /// Nothing is needed.
    Nothing,
    /// Another command.
    Shell(&'static str),
    /// The daemon and the example consumer, running.
    Deployment,
}

impl Page {
    /// Reads it.
    ///
    /// # Panics
    ///
    /// When it is not there.
    #[must_use]
    pub fn read(path: &'static str) -> Self {
        let text = fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { path, text }
    }

    /// Its blocks, in their order.
    ///
    /// # Panics
    ///
    /// When one does not end.
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

    /// What is outside of the blocks, by line.
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

    /// What is between backticks, by line.
    #[must_use]
    pub fn code(&self) -> Vec<(usize, &str)> {
        let mut code = Vec::new();
        for (number, line) in self.prose() {
            code.extend(line.split('`').skip(1).step_by(2).map(|code| (number, code)));
        }
        code
    }

    /// Where its links lead, by line.
    #[must_use]
    pub fn links(&self) -> Vec<(usize, &str)> {
        let mut links = Vec::new();
        for (number, line) in self.prose() {
            links.extend(line.split("](").skip(1).filter_map(|rest| Some((number, rest.split_once(')')?.0))));
        }
        links
    }

    /// The anchors of its headings, as GitHub makes them.
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

    /// All of it.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl Block {
    /// Whether its fence says so.
    #[must_use]
    pub fn is(&self, mark: &str) -> bool {
        self.marks.iter().any(|other| other == mark)
    }

    /// Its commands, a line each.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.text.replace("\\\n", " ").lines().map(str::to_owned).collect()
    }
}

impl Elsewhere {
    /// Whether this is the command of `line`, but for a comment behind it.
    #[must_use]
    pub fn is(&self, line: &str) -> bool {
        line.split("  #").next().is_some_and(|command| command.trim_end() == self.command)
    }
}
