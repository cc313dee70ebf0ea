//! `tidings ready`: asks the daemon whether it is ready, as `/readyz` says, and answers with the exit code: for the health
//! check of a container, which has no other program to ask with. The doctor asks the same way.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::output::{Output, complain};
use crate::cli::usage;
use crate::config::HttpArgs;

/// How long the daemon may take to answer: it gives the database 3 s.
const DEADLINE: Duration = Duration::from_secs(10);
/// Who has not taken the connection by then is not there.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// What came of asking the daemon.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It works.
    Ready,
    /// It does not, and says why.
    NotReady(String),
    /// Nobody is there.
    Nobody(String),
    /// Somebody is, and does not answer as a daemon does.
    Strange(String),
}

pub(super) fn ready(args: HttpArgs, output: Output) -> ExitCode {
    let addr = match args.check() {
        Ok(addr) => addr,
        Err(mistakes) => return usage(&mistakes),
    };
    let problem = match ask(addr) {
        Answer::Ready => {
            output.json(&json!({"ready": true}));
            return ExitCode::SUCCESS;
        }
        Answer::NotReady(reasons) => format!("the daemon at {addr} is not ready: {reasons}"),
        Answer::Nobody(why) => format!("no daemon answers at {addr} ({why}); is that its TIDINGS_HTTP_ADDR?"),
        Answer::Strange(what) => format!("what answers at {addr} is no daemon, or hangs: {what}"),
    };
    output.json(&json!({"ready": false, "problem": problem}));
    complain(format_args!("tidings: {problem}"));
    ExitCode::FAILURE
}

/// Asks the daemon that listens on `addr`. Blocks, for [`DEADLINE`] at most.
pub(super) fn ask(addr: SocketAddr) -> Answer {
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(DEADLINE))
        .timeout_connect(Some(CONNECT_DEADLINE))
        .http_status_as_error(false)
        // The daemon is beside us, where no proxy is asked.
        .proxy(None)
        .build()
        .new_agent();
    let answered = agent.get(format!("http://{}/readyz", reachable(addr))).call().and_then(|mut answer| {
        let text = answer.body_mut().read_to_string()?;
        Ok((answer.status().as_u16(), text))
    });
    match answered {
        Ok((status, text)) => understand(status, &text),
        Err(error) if is_nobody(&error) => Answer::Nobody(error.to_string()),
        Err(error) => Answer::Strange(error.to_string()),
    }
}

/// A daemon that listens everywhere listens here.
fn reachable(mut addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => addr.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => addr.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    addr
}

/// Whether it was not even connected to anybody.
fn is_nobody(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::ConnectionRefused
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                | ErrorKind::AddrNotAvailable
        ),
        ureq::Error::ConnectionFailed | ureq::Error::Timeout(ureq::Timeout::Connect) => true,
        _ => false,
    }
}

/// What an answer of `/readyz` means.
fn understand(status: u16, text: &str) -> Answer {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    match (status, answer["ready"].as_bool()) {
        (200, Some(true)) => Answer::Ready,
        (503, Some(false)) => {
            let reasons = answer["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
            Answer::NotReady(reasons.collect::<Vec<_>>().join("; "))
        }
        _ => Answer::Strange(format!("status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_that_of_a_daemon_or_strange() {
        assert_eq!(understand(200, r#"{"ready":true,"reasons":[]}"#), Answer::Ready);
        let not_ready = understand(503, r#"{"ready":false,"reasons":["late","away"]}"#);
        assert_eq!(not_ready, Answer::NotReady("late; away".into()));
        for (status, text) in [(200, "<html>"), (404, ""), (503, "busy"), (200, r#"{"ready":false}"#)] {
            assert_eq!(understand(status, text), Answer::Strange(format!("status {status}")));
        }
    }

    #[test]
    fn whoever_refuses_the_connection_is_nobody_and_whoever_takes_it_is_somebody() {
        assert!(is_nobody(&ureq::Error::Io(ErrorKind::ConnectionRefused.into())));
        assert!(is_nobody(&ureq::Error::Timeout(ureq::Timeout::Connect)));
        assert!(!is_nobody(&ureq::Error::Io(ErrorKind::ConnectionReset.into())));
        assert!(!is_nobody(&ureq::Error::Timeout(ureq::Timeout::Global)));
    }

    #[test]
    fn a_daemon_that_listens_everywhere_is_asked_here() {
        for (given, asked) in
            [("0.0.0.0:7070", "127.0.0.1:7070"), ("[::]:7070", "[::1]:7070"), ("10.0.0.1:7070", "10.0.0.1:7070")]
        {
            assert_eq!(reachable(given.parse().expect("an address")).to_string(), asked);
        }
    }
}
