//! Writes to standard error without ever blocking or failing. A daemon outlives the terminal, the pipe and the disk
//! that its log goes to: a line that cannot be written, or finds a full pipe for 0.1 s, is dropped and counted.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::telemetry::count_dropped_line;

/// A pipe that poll(2) reports as writable takes at least this many bytes (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;
/// How long a line waits for a slow reader. Further lines do not wait until the reader has made room.
const READER_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Whether the last line found the pipe full.
static FULL: AtomicBool = AtomicBool::new(false);

/// A writer that accepts every line.
#[derive(Clone, Copy, Debug)]
pub(in crate::telemetry) struct Stderr;

impl Write for Stderr {
    /// Writes `line`. If that fails, the rest of the line is dropped.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if try_to_write(line).is_err() {
            count_dropped_line();
        }
        // tracing-subscriber would report an error on standard error, and panic if it cannot write there.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn try_to_write(line: &[u8]) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    for chunk in line.chunks(CHUNK_BYTES) {
        let timeout = if FULL.load(Ordering::Relaxed) { NO_WAIT } else { READER_TIMEOUT };
        let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&timeout));
        // If poll(2) itself fails, the write is tried.
        let full = ready == Ok(0);
        FULL.store(full, Ordering::Relaxed);
        if full {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stderr.write_all(chunk)?;
    }
    Ok(())
}
