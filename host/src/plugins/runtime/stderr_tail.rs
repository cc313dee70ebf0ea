//! What a plugin writes to its standard error, where toolchains put the text of a panic: the end of it, for the error
//! message. However much it writes, a few kilobytes are kept.

use std::sync::{Arc, Mutex};

use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi_io::bytes::Bytes;

/// Bytes that are kept: a panic's sentence with its place, not what went before.
const KEPT_BYTES: usize = 2_000;

/// The end of what was written.
#[derive(Clone, Debug, Default)]
pub(in crate::plugins) struct StderrTail(Arc<Mutex<Vec<u8>>>);

impl StderrTail {
    /// The text, without the note on backtraces that Rust adds.
    pub(in crate::plugins) fn text(&self) -> String {
        let kept = self.0.lock().expect("no writer panicked");
        String::from_utf8_lossy(&kept)
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with("note: run with `RUST_BACKTRACE"))
            .map(|line| line.chars().map(|char| if char.is_control() { ' ' } else { char }).collect())
            .collect::<Vec<String>>()
            .join(" ")
    }

    /// Adds a line.
    pub(in crate::plugins) fn hear(&self, line: &str) {
        self.keep(line.as_bytes());
        self.keep(b"\n");
    }

    fn keep(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().expect("no writer panicked");
        kept.extend_from_slice(&bytes[bytes.len().saturating_sub(KEPT_BYTES)..]);
        let surplus = kept.len().saturating_sub(KEPT_BYTES);
        kept.drain(..surplus);
    }

    /// Forgets everything, for the next call.
    pub(in crate::plugins) fn clear(&self) {
        self.0.lock().expect("no writer panicked").clear();
    }
}

impl IsTerminal for StderrTail {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for StderrTail {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Of WASI 0.3, which is not linked.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for StderrTail {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.keep(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 * 1024)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for StderrTail {
    async fn ready(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept_and_it_is_one_line() {
        let mut words = StderrTail::default();
        for _ in 0..100 {
            words.write(Bytes::from(vec![b'x'; 70_000])).expect("written");
        }
        words
            .write("\nthread panicked at src/lib.rs:1:2:\nas\u{1b}[1m asked\nnote: run with `RUST_BACKTRACE=1`".into())
            .expect("written");
        assert!(words.text().ends_with("x thread panicked at src/lib.rs:1:2: as [1m asked"), "{}", words.text());
        assert!(words.text().len() <= KEPT_BYTES);
        words.clear();
        assert_eq!(words.text(), "");
    }
}
