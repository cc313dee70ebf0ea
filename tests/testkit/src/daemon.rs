//! Runs the daemon as a process, and collects its log.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{EVENT_TIMEOUT, eventually, eventually_within};

/// The program, the arguments and the environment with which to start a daemon or a command.
#[derive(Clone, Debug)]
pub struct Launch {
    binary: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

/// A running daemon. Dropping this value kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// The threads that collect the log. They end when the daemon's output ends.
    readers: Vec<JoinHandle<()>>,
}

impl Launch {
    /// `tidings SUBCOMMAND`, without any settings.
    #[must_use]
    pub fn new(binary: &Path, subcommand: &str) -> Self {
        Self::of_program(binary).args([subcommand])
    }

    /// Any other program, without arguments and without settings.
    #[must_use]
    pub fn of_program(binary: &Path) -> Self {
        Self { binary: binary.to_owned(), arguments: Vec::new(), environment: Vec::new() }
    }

    /// The same settings for another program, without arguments.
    #[must_use]
    pub fn with_program(self, binary: &Path) -> Self {
        Self { binary: binary.to_owned(), arguments: Vec::new(), ..self }
    }

    /// Replaces all arguments by `subcommand`.
    #[must_use]
    pub fn subcommand(mut self, subcommand: &str) -> Self {
        self.arguments = vec![subcommand.to_owned()];
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_string_lossy().into_owned()));
        self
    }

    /// Sets the environment variable `name`; a later value replaces an earlier one.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// Leaves the environment variable `name` unset.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self
    }

    /// The command, for a caller that needs its own standard input and output. `TIDINGS_` and `OTEL_` variables of this
    /// process are not passed on.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(&self.arguments);
        for (name, _) in std::env::vars_os() {
            if ["TIDINGS_", "OTEL_"].iter().any(|begin| name.to_string_lossy().starts_with(begin)) {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts the program without waiting for anything.
    ///
    /// # Panics
    ///
    /// When the program cannot be started.
    #[must_use]
    pub fn start(&self) -> Daemon {
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} could not be started: {error}", self.binary.display()));
        let log = Arc::new(Mutex::new(Vec::new()));
        let outputs: [Box<dyn std::io::Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("piped")), Box::new(child.stderr.take().expect("piped"))];
        let readers = outputs.into_iter().map(|output| {
            let log = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    log.lock().expect("no reader panicked").push(line);
                }
            })
        });
        Daemon { child, readers: readers.collect(), log }
    }

    /// Starts the daemon and waits until its log says that it is ready.
    ///
    /// # Panics
    ///
    /// When it is not ready in time.
    pub async fn start_ready(&self) -> Daemon {
        let mut daemon = self.start();
        daemon.wait_for_line(" ready ").await;
        daemon
    }

    /// Runs the program until it ends, and returns its exit code and its output.
    ///
    /// # Panics
    ///
    /// When it does not end in time, or is killed by a signal.
    pub async fn run_to_end(&self) -> (i32, String) {
        let mut daemon = self.start();
        let status = daemon.wait_for_end().await;
        (status.code().expect("it was not killed"), daemon.log())
    }
}

impl Daemon {
    /// Waits for a line of the log that contains `text`, and returns it.
    ///
    /// # Panics
    ///
    /// When there is no such line in time, or the daemon ends without writing it.
    pub async fn wait_for_line(&mut self, text: &str) -> String {
        self.wait_for_line_within(text, EVENT_TIMEOUT).await
    }

    /// [`Daemon::wait_for_line`] with ten times the timeout, for events that take minutes: compiling the interpreter
    /// of another language, or a hundred plugins.
    ///
    /// # Panics
    ///
    /// As [`Daemon::wait_for_line`].
    pub async fn wait_longer_for_line(&mut self, text: &str) -> String {
        self.wait_for_line_within(text, 10 * EVENT_TIMEOUT).await
    }

    async fn wait_for_line_within(&mut self, text: &str, timeout: Duration) -> String {
        eventually_within(timeout, &format!("the log line {text:?}"), async || {
            let ended = self.child.try_wait().expect("our child").is_some();
            let found = self.log.lock().expect("no reader panicked").iter().find(|line| line.contains(text)).cloned();
            assert!(found.is_some() || !ended, "the daemon ended without the line {text:?}:\n{}", self.log());
            found
        })
        .await
    }

    /// Everything that the daemon has written so far.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().expect("no reader panicked").join("\n")
    }

    /// The address of the daemon's HTTP interface, which it writes to its log.
    ///
    /// # Panics
    ///
    /// When the log does not contain the address in time.
    pub async fn http_addr(&mut self) -> String {
        let line = self.wait_for_line("HTTP at http://").await;
        let addr = line.rsplit("http://").next().expect("there is one");
        // In a JSON log, more fields follow the address.
        addr.split('"').next().expect("there is one").to_owned()
    }

    /// Whether the process has ended.
    ///
    /// # Panics
    ///
    /// Never: the process is a child of this one.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_some()
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process.
    ///
    /// # Panics
    ///
    /// When the process has ended.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it is running");
    }

    /// Waits until the process ends and its output has been collected.
    ///
    /// # Panics
    ///
    /// When the process does not end in time.
    pub async fn wait_for_end(&mut self) -> ExitStatus {
        let status = eventually("the end of the daemon", async || self.child.try_wait().expect("our child")).await;
        // The reader threads may not have collected the last lines yet.
        for reader in self.readers.drain(..) {
            reader.join().expect("no reader panicked");
        }
        status
    }

    /// Sends SIGTERM and waits until the process ends.
    ///
    /// # Panics
    ///
    /// When the process does not end in time.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_for_end().await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of the daemon\n{}", self.log());
        }
    }
}
