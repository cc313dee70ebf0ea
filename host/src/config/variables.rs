//! RowRef variables of the environment are settings, which are mistakes, and which are set by others and ignored.

use clap::Args as _;

use crate::config::DoctorArgs;

/// What the names of all settings begin with.
const PREFIX: &str = "TIDINGS_";
/// Variables of users' own, in the same file or shell as the settings. The daemon never reads them.
const USERS_PREFIX: &str = "TIDINGS_X_";

/// What a variable whose name begins with [`PREFIX`] is.
#[derive(Debug, PartialEq, Eq)]
enum Variable {
    Setting,
    /// Kubernetes or Docker set it, to say where a service or container named `tidings…` is.
    ServiceLink,
    UsersOwn,
    Unknown,
}

/// A sentence for each variable that begins like a setting and is none: a misspelt one must not be ignored.
pub(super) fn unknown_variables() -> Vec<String> {
    let settings = settings();
    let unknown = names(&settings, &Variable::Unknown).into_iter();
    let sentence = |name: String| {
        let own = name.replacen(PREFIX, USERS_PREFIX, 1);
        format!("{name} is not a setting; there are {}. A variable of your own may be named {own}", settings.join(", "))
    };
    unknown.map(sentence).collect()
}

/// The variables that Kubernetes or Docker set for a service named `tidings…`, in alphabetical order. They are ignored.
pub(crate) fn service_links() -> Vec<String> {
    names(&settings(), &Variable::ServiceLink)
}

/// The names of all settings.
fn settings() -> Vec<String> {
    // Those of the doctor are those of the daemon, and one more.
    let command = DoctorArgs::augment_args(clap::Command::new("doctor"));
    command.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned())).collect()
}

fn names(settings: &[String], wanted: &Variable) -> Vec<String> {
    let all = std::env::vars_os().map(|(name, value)| (name.to_string_lossy().into_owned(), value));
    let mut names: Vec<String> = all
        .filter(|(name, _)| name.starts_with(PREFIX))
        .filter(|(name, value)| variable(settings, name, &value.to_string_lossy()) == *wanted)
        .map(|(name, _)| name)
        .collect();
    names.sort();
    names
}

fn variable(settings: &[String], name: &str, value: &str) -> Variable {
    if settings.iter().any(|setting| setting == name) {
        Variable::Setting
    } else if name.starts_with(USERS_PREFIX) {
        Variable::UsersOwn
    } else if is_service_link(name, value) {
        Variable::ServiceLink
    } else {
        Variable::Unknown
    }
}

/// Whether Kubernetes sets such a variable for a Service
/// (<https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables>), or Docker for a link
/// (<https://docs.docker.com/engine/network/links/>). The value counts as well: `TIDINGS_HTTP_PORT=8080` is a mistake of a user,
/// and `TIDINGS_HTTP_PORT=tcp://10.0.0.11:8080` is the Service `tidings-http`.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_address = || ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_PORT") && is_address() {
        return true;
    }
    if name.contains("_SERVICE_PORT") {
        return is_port(value);
    }
    // Of Docker's links alone.
    if name.ends_with("_NAME") && value.starts_with('/') || name.contains("_ENV_") {
        return true;
    }
    // TIDINGS_PORT_7070_TCP, and with _PROTO, _PORT or _ADDR behind it.
    name.split_once("_PORT_").is_some_and(|(_, rest)| {
        let mut parts = rest.split('_');
        parts.next().is_some_and(is_port)
            && parts.next().is_some_and(|protocol| ["TCP", "UDP", "SCTP"].contains(&protocol))
            && parts.next().is_none_or(|what| ["PROTO", "PORT", "ADDR"].contains(&what))
            && parts.next().is_none()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_and_docker_set_for_a_service_is_told_from_a_misspelt_setting() {
        let settings = settings();
        let of = |name, value| variable(&settings, name, value);
        for (name, value) in [
            ("TIDINGS_SERVICE_HOST", "10.0.0.11"),
            ("TIDINGS_SERVICE_PORT", "7070"),
            ("TIDINGS_SERVICE_PORT_HTTP", "7070"),
            ("TIDINGS_PORT", "tcp://10.0.0.11:7070"),
            ("TIDINGS_PORT_7070_TCP", "tcp://10.0.0.11:7070"),
            ("TIDINGS_PORT_7070_TCP_PROTO", "tcp"),
            ("TIDINGS_PORT_7070_TCP_PORT", "7070"),
            ("TIDINGS_PORT_7070_TCP_ADDR", "10.0.0.11"),
            ("TIDINGS_HTTP_SERVICE_HOST", "10.0.0.11"),
            ("TIDINGS_HTTP_PORT", "tcp://10.0.0.11:80"),
            ("TIDINGS_NAME", "/app/tidings"),
            ("TIDINGS_ENV_PATH", "/bin"),
        ] {
            assert_eq!(of(name, value), Variable::ServiceLink, "{name}={value}");
        }
        for (name, value) in [
            ("TIDINGS_PORT", "7070"),
            ("TIDINGS_HTTP_PORT", "8080"),
            ("TIDINGS_SERVICE_PORT", "http"),
            ("TIDINGS_PORT_7070_HTTP", "7070"),
            ("TIDINGS_NAME", "shop"),
            ("TIDINGS_IMAGE", "tidings:1"),
            ("TIDINGS_SWEEEP_MS", "5000"),
            ("TIDINGS_XSWEEP_MS", "5000"),
        ] {
            assert_eq!(of(name, value), Variable::Unknown, "{name}={value}");
        }
        assert_eq!(of("TIDINGS_X_IMAGE", "tidings:1"), Variable::UsersOwn);
        assert_eq!(of("TIDINGS_SWEEP_MS", "5000"), Variable::Setting);
    }
}
