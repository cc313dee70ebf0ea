//! Standard error, whoever reads it. A daemon outlives the terminal, the pipe and the disk that its log goes to: a line that
//! cannot be written, or for which nobody makes room, is dropped and counted, and nothing else comes of it.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::telemetry::count_dropped_line;

/// As much finds room in a pipe that says it has some (`PIPE_BUF`).
const PART: usize = 4096;
/// How long a line waits for a reader that is behind. The next ones do not wait until it goes on.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const NOT_AT_ALL: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The last line found no room.
static FULL: AtomicBool = AtomicBool::new(false);

/// Takes every line.
#[derive(Clone, Copy, Debug)]
pub(in crate::telemetry) struct Stderr;

impl Write for Stderr {
    /// Writes `line`, whole or, if that fails, no further.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if try_to_write(line).is_err() {
            count_dropped_line();
        }
        // An error would be reported by tracing-subscriber, on standard error, with a panic if that cannot be written.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn try_to_write(line: &[u8]) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    for part in line.chunks(PART) {
        let patience = if FULL.load(Ordering::Relaxed) { NOT_AT_ALL } else { PATIENCE };
        let ready = poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience));
        // What cannot be asked is tried.
        let full = ready == Ok(0);
        FULL.store(full, Ordering::Relaxed);
        if full {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stderr.write_all(part)?;
    }
    Ok(())
}
