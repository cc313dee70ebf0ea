//! `tidings ready`: asks the daemon's `/readyz` whether it is ready, and answers with the exit code. It is for the
//! health check of a container, which has no other HTTP client. The doctor asks the same way.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::fail_usage;
use crate::cli::output::{Output, complain};
use crate::config::HttpArgs;

/// How long the daemon may take to answer: it waits up to 3 s for the database.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long connecting may take. After that the daemon counts as not running.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// The daemon's answer, or why there is none.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The daemon is ready. What an operator should know nevertheless.
    Ready(Vec<String>),
    /// The daemon is not ready, for these reasons.
    NotReady(String),
    /// No connection could be made.
    Unreachable(String),
    /// A connection was made, but there was no answer, or not that of a daemon.
    Unexpected(String),
}

pub(super) fn ready(args: HttpArgs, output: Output) -> ExitCode {
    let addr = match args.check() {
        Ok(addr) => addr,
        Err(errors) => return fail_usage(&errors),
    };
    let problem = match ask(addr) {
        Answer::Ready(_) => {
            output.json(&json!({"ready": true}));
            return ExitCode::SUCCESS;
        }
        Answer::NotReady(reasons) => format!("the daemon at {addr} is not ready: {reasons}"),
        Answer::Unreachable(reason) => {
            format!("no daemon answers at {addr} ({reason}); is that its TIDINGS_HTTP_ADDR?")
        }
        Answer::Unexpected(problem) => format!("the server at {addr} is not a daemon, or it hangs: {problem}"),
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
        // The daemon runs on this host, where no proxy is needed.
        .proxy(None)
        .build()
        .new_agent();
    let response = agent.get(format!("http://{}/readyz", local_addr(addr))).call().and_then(|mut answer| {
        let text = answer.body_mut().read_to_string()?;
        Ok((answer.status().as_u16(), text))
    });
    match response {
        Ok((status, text)) => parse_answer(status, &text),
        Err(error) if is_unreachable(&error) => Answer::Unreachable(error.to_string()),
        Err(error) => Answer::Unexpected(error.to_string()),
    }
}

/// The address at which this host reaches the daemon: the loopback address, if the daemon listens on all addresses.
fn local_addr(mut addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => addr.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => addr.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    addr
}

/// Whether no connection could be made at all.
fn is_unreachable(error: &ureq::Error) -> bool {
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

/// Reads the answer of `/readyz`.
fn parse_answer(status: u16, text: &str) -> Answer {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    match (status, answer["ready"].as_bool()) {
        (200, Some(true)) => Answer::Ready(sentences(&answer["notes"]).map(str::to_owned).collect()),
        (503, Some(false)) => Answer::NotReady(sentences(&answer["reasons"]).collect::<Vec<_>>().join("; ")),
        _ => Answer::Unexpected(format!("status {status}")),
    }
}

fn sentences(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_no_daemon_gives_is_unexpected() {
        assert_eq!(parse_answer(200, r#"{"ready":true,"reasons":[]}"#), Answer::Ready(Vec::new()));
        let noted = parse_answer(200, r#"{"ready":true,"reasons":[],"notes":["full"]}"#);
        assert_eq!(noted, Answer::Ready(vec!["full".to_owned()]));
        let not_ready = parse_answer(503, r#"{"ready":false,"reasons":["late","away"]}"#);
        assert_eq!(not_ready, Answer::NotReady("late; away".into()));
        for (status, text) in [(200, "<html>"), (404, ""), (503, "busy"), (200, r#"{"ready":false}"#)] {
            assert_eq!(parse_answer(status, text), Answer::Unexpected(format!("status {status}")));
        }
    }

    #[test]
    fn a_refused_connection_is_unreachable_and_one_that_breaks_later_is_not() {
        assert!(is_unreachable(&ureq::Error::Io(ErrorKind::ConnectionRefused.into())));
        assert!(is_unreachable(&ureq::Error::Timeout(ureq::Timeout::Connect)));
        assert!(!is_unreachable(&ureq::Error::Io(ErrorKind::ConnectionReset.into())));
        assert!(!is_unreachable(&ureq::Error::Timeout(ureq::Timeout::Global)));
    }

    #[test]
    fn a_daemon_that_listens_on_all_addresses_is_asked_on_the_loopback_address() {
        for (given, expected) in
            [("0.0.0.0:7070", "127.0.0.1:7070"), ("[::]:7070", "[::1]:7070"), ("10.0.0.1:7070", "10.0.0.1:7070")]
        {
            assert_eq!(local_addr(given.parse().expect("an address")).to_string(), expected);
        }
    }
}
