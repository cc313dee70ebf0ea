//! The real daemon as a process of its own, with its log in our hands.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{PATIENCE, eventually, eventually_within};

/// How to start a daemon.
#[derive(Clone, Debug)]
pub struct Launch {
    binary: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// They end with its output.
    readers: Vec<JoinHandle<()>>,
}

impl Launch {
    /// `tidings SUBCOMMAND` without any settings.
    #[must_use]
    pub fn new(binary: &Path, subcommand: &str) -> Self {
        Self::program(binary).args([subcommand])
    }

    /// Another program than the daemon, without arguments and without any settings.
    #[must_use]
    pub fn program(binary: &Path) -> Self {
        Self { binary: binary.to_owned(), arguments: Vec::new(), environment: Vec::new() }
    }

    /// Another program with the same settings, without arguments.
    #[must_use]
    pub fn running(self, binary: &Path) -> Self {
        Self { binary: binary.to_owned(), arguments: Vec::new(), ..self }
    }

    /// With another subcommand.
    #[must_use]
    pub fn subcommand(mut self, subcommand: &str) -> Self {
        self.arguments = vec![subcommand.to_owned()];
        self
    }

    /// With further arguments.
    #[must_use]
    pub fn args<A: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_string_lossy().into_owned()));
        self
    }

    /// With the variable `name` set to `value`; the last one wins.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// Without the variable `name`.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self
    }

    /// The command itself, for who wants to feed and read it otherwise.
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

    /// Starts it, and waits for nothing.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
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

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub async fn ready(&self) -> Daemon {
        let mut daemon = self.start();
        daemon.wait_for_line(" ready ").await;
        daemon
    }

    /// Runs it to its end, and returns its exit code and what it wrote.
    ///
    /// # Panics
    ///
    /// When it does not end, or is killed.
    pub async fn finished(&self) -> (i32, String) {
        let mut daemon = self.start();
        let status = daemon.ended().await;
        (status.code().expect("it was not killed"), daemon.log())
    }
}

impl Daemon {
    /// Waits for a line of the log that contains `text`, and returns it.
    ///
    /// # Panics
    ///
    /// When there is none in time, or the daemon ended without.
    pub async fn wait_for_line(&mut self, text: &str) -> String {
        self.line(text, PATIENCE).await
    }

    /// The same for what takes minutes: compiling the interpreter of another language, or a hundred plugins.
    ///
    /// # Panics
    ///
    /// As [`Daemon::wait_for_line`].
    pub async fn wait_longer_for_line(&mut self, text: &str) -> String {
        self.line(text, 10 * PATIENCE).await
    }

    async fn line(&mut self, text: &str, patience: Duration) -> String {
        eventually_within(patience, &format!("the log line {text:?}"), async || {
            let ended = self.child.try_wait().expect("our child").is_some();
            let found = self.log.lock().expect("no reader panicked").iter().find(|line| line.contains(text)).cloned();
            assert!(found.is_some() || !ended, "the daemon ended without the line {text:?}:\n{}", self.log());
            found
        })
        .await
    }

    /// Everything that it has written.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().expect("no reader panicked").join("\n")
    }

    /// The address of its HTTP interface.
    ///
    /// # Panics
    ///
    /// When it does not say it in time.
    pub async fn http_addr(&mut self) -> String {
        let line = self.wait_for_line("HTTP at http://").await;
        let addr = line.rsplit("http://").next().expect("there is one");
        // As JSON, the line goes on.
        addr.split('"').next().expect("there is one").to_owned()
    }

    /// Whether it has ended.
    ///
    /// # Panics
    ///
    /// Never, since it is our child.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_some()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        kill(Pid::from_raw(pid), signal).expect("it is running");
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it does not end in time.
    pub async fn ended(&mut self) -> ExitStatus {
        let status = eventually("the end of the daemon", async || self.child.try_wait().expect("our child")).await;
        // Its last lines may still be on their way.
        for reader in self.readers.drain(..) {
            reader.join().expect("no reader panicked");
        }
        status
    }

    /// Asks it to stop with SIGTERM, and waits for its end.
    ///
    /// # Panics
    ///
    /// When it does not stop.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended().await
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
