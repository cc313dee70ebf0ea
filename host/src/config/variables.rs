//! Decides for each variable of the environment that begins with `TIDINGS_` whether it is a setting, an error, or set
//! by another program and ignored.

use clap::Args as _;

use crate::config::DoctorArgs;

/// The prefix of all settings.
const PREFIX: &str = "TIDINGS_";
/// The prefix of variables that users define for themselves beside the settings. The daemon never reads them.
const USERS_PREFIX: &str = "TIDINGS_X_";

/// What a variable with the [`PREFIX`] is.
#[derive(Debug, PartialEq, Eq)]
enum Variable {
    Setting,
    /// Kubernetes or Docker set it, to say where a service or container named `tidings…` is.
    ServiceLink,
    UsersOwn,
    Unknown,
}

/// Returns an error for each variable with the prefix that is not a setting: a misspelt setting must not be ignored.
pub(super) fn check_names() -> Vec<String> {
    let settings = setting_names();
    let unknown = find_variables(&settings, &Variable::Unknown).into_iter();
    let sentence = |name: String| {
        let own = name.replacen(PREFIX, USERS_PREFIX, 1);
        format!("{name} is not a setting; there are {}. A variable of your own may be named {own}", settings.join(", "))
    };
    unknown.map(sentence).collect()
}

/// The variables that Kubernetes or Docker set for a service named `tidings…`, in alphabetical order. They are ignored.
pub(crate) fn find_service_links() -> Vec<String> {
    find_variables(&setting_names(), &Variable::ServiceLink)
}

/// The names of all settings.
fn setting_names() -> Vec<String> {
    // The doctor has all settings of the daemon.
    let command = DoctorArgs::augment_args(clap::Command::new("doctor"));
    command.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned())).collect()
}

/// The names of the variables of one sort, in alphabetical order.
fn find_variables(settings: &[String], wanted: &Variable) -> Vec<String> {
    let all = std::env::vars_os().map(|(name, value)| (name.to_string_lossy().into_owned(), value));
    let mut names: Vec<String> = all
        .filter(|(name, _)| name.starts_with(PREFIX))
        .filter(|(name, value)| classify(settings, name, &value.to_string_lossy()) == *wanted)
        .map(|(name, _)| name)
        .collect();
    names.sort();
    names
}

fn classify(settings: &[String], name: &str, value: &str) -> Variable {
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
/// (<https://docs.docker.com/engine/network/links/>). The value counts as well: `TIDINGS_HTTP_PORT=8080` is an error of
/// the user, and `TIDINGS_HTTP_PORT=tcp://10.0.0.11:8080` is the Service `tidings-http`.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_address = || ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_PORT") && is_address() {
        return true;
    }
    if name.contains("_SERVICE_PORT") {
        return is_port(value);
    }
    // Only Docker sets these.
    if name.ends_with("_NAME") && value.starts_with('/') || name.contains("_ENV_") {
        return true;
    }
    // TIDINGS_PORT_7070_TCP, alone or followed by _PROTO, _PORT or _ADDR.
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
    fn variables_of_kubernetes_and_docker_are_distinguished_from_misspelt_settings() {
        let settings = setting_names();
        let of = |name, value| classify(&settings, name, value);
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
