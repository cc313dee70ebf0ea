//! A plugin's standard error, to which toolchains write the text of a panic. Only the end of the text is kept, for the
//! error of a call that fails, however much the plugin writes.

use std::sync::{Arc, Mutex};

use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi_io::bytes::Bytes;

/// How many bytes are kept: room for the text and the place of a panic.
const MAX_KEPT_BYTES: usize = 2_000;

/// The end of the text that was written.
#[derive(Clone, Debug, Default)]
pub(in crate::plugins) struct StderrTail(Arc<Mutex<Vec<u8>>>);

impl StderrTail {
    /// The text, without the note on backtraces that Rust adds.
    pub(in crate::plugins) fn text(&self) -> String {
        let kept = self.0.lock().expect("no thread panics with this lock");
        String::from_utf8_lossy(&kept)
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with("note: run with `RUST_BACKTRACE"))
            .map(|line| line.chars().map(|char| if char.is_control() { ' ' } else { char }).collect())
            .collect::<Vec<String>>()
            .join(" ")
    }

    /// Adds a line.
    pub(in crate::plugins) fn push_line(&self, line: &str) {
        self.push_bytes(line.as_bytes());
        self.push_bytes(b"\n");
    }

    fn push_bytes(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().expect("no thread panics with this lock");
        kept.extend_from_slice(&bytes[bytes.len().saturating_sub(MAX_KEPT_BYTES)..]);
        let surplus = kept.len().saturating_sub(MAX_KEPT_BYTES);
        kept.drain(..surplus);
    }

    /// Forgets everything, for the next call.
    pub(in crate::plugins) fn clear(&self) {
        self.0.lock().expect("no thread panics with this lock").clear();
    }
}

impl IsTerminal for StderrTail {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for StderrTail {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Only WASI 0.3 uses this stream, and it is not linked.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for StderrTail {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.push_bytes(&bytes);
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
    fn only_the_end_is_kept_as_one_line() {
        let mut tail = StderrTail::default();
        for _ in 0..100 {
            tail.write(Bytes::from(vec![b'x'; 70_000])).expect("written");
        }
        tail.write("\nthread panicked at src/lib.rs:1:2:\nas\u{1b}[1m asked\nnote: run with `RUST_BACKTRACE=1`".into())
            .expect("written");
        assert!(tail.text().ends_with("x thread panicked at src/lib.rs:1:2: as [1m asked"), "{}", tail.text());
        assert!(tail.text().len() <= MAX_KEPT_BYTES);
        tail.clear();
        assert_eq!(tail.text(), "");
    }
}
