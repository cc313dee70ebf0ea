//! The servers that `TIDINGS_DATABASE_URL` names: one or several hosts, and which kind of server a session needs, written as
//! libpq reads it. sqlx reads a URL with one host, so each host gets a URL of its own here.
//!
//! Must never connect: `login.rs` does.

use std::str::FromStr as _;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use sqlx::postgres::PgConnectOptions;

/// The parameters that name hosts. libpq lets them win over the hosts before the path.
const HOSTS: [&str; 3] = ["host", "hostaddr", "port"];
/// The parameters that sqlx does not know, and that are read here.
const TARGET_SESSION_ATTRS: &str = "target_session_attrs";
const LOAD_BALANCE_HOSTS: &str = "load_balance_hosts";
const CONNECT_TIMEOUT: &str = "connect_timeout";

/// The servers of one URL.
#[derive(Clone, Debug)]
pub(in crate::store) struct Hosts {
    /// In the order in which they are tried, at least one.
    pub(super) hosts: Vec<Host>,
    /// Whether a session must be on a server that takes writes.
    pub(super) must_write: bool,
    /// How long connecting to one address and logging in may take; `None` = as long as the caller waits.
    pub(super) connect_timeout: Option<Duration>,
}

/// One server, by a name that may have several addresses.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// Host and port, for people.
    pub(super) place: String,
    /// How to log in there.
    pub(super) options: PgConnectOptions,
}

/// The parts of a URL.
struct Parts<'a> {
    scheme: &'a str,
    /// User and password with the `@` behind them, or nothing.
    userinfo: &'a str,
    /// Hosts with their ports, separated by commas.
    hosts: &'a str,
    /// The database with the slash before it, or nothing.
    path: &'a str,
    /// Names and values as they are written.
    parameters: Vec<(&'a str, &'a str)>,
}

impl<'a> Parts<'a> {
    fn of(url: &'a str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let (rest, _fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (userinfo, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
        let parameters = parameters.map(|parameter| parameter.split_once('=').unwrap_or((parameter, ""))).collect();
        Some(Self { scheme, userinfo, hosts, path, parameters })
    }

    /// The last value that a parameter was given.
    fn parameter(&self, name: &str) -> Option<String> {
        let value = self.parameters.iter().rev().find(|(key, _)| *key == name)?.1;
        Some(percent_decode_str(value).decode_utf8_lossy().into_owned())
    }

    /// The same URL with one host, and with the parameters that sqlx may read.
    fn with_host(&self, host: &str, port: &str) -> String {
        let is_bare_v6 = host.contains(':') && !host.starts_with('/');
        let host = match host {
            directory if directory.starts_with('/') => utf8_percent_encode(directory, NON_ALPHANUMERIC).to_string(),
            address if is_bare_v6 => format!("[{address}]"),
            name => name.to_owned(),
        };
        let port = if port.is_empty() { String::new() } else { format!(":{port}") };
        let for_sqlx = self.parameters.iter().filter(|(key, _)| {
            !HOSTS.contains(key) && ![TARGET_SESSION_ATTRS, LOAD_BALANCE_HOSTS, CONNECT_TIMEOUT].contains(key)
        });
        let query: Vec<String> = for_sqlx.map(|(key, value)| format!("{key}={value}")).collect();
        format!("{}://{}{host}{port}{}?{}", self.scheme, self.userinfo, self.path, query.join("&"))
    }
}

impl Hosts {
    /// Reads a URL; `variable` gives the value of one of libpq's environment variables. The error is a sentence without the
    /// password.
    pub(in crate::store) fn parse(url: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let parts = Parts::of(url).ok_or("it has no ://")?;
        if parts.parameter("service").is_some() {
            return Err("service is not supported: write the parameters of the service into the URL".into());
        }
        if parts.parameter("passfile").is_some() {
            return Err("passfile is not supported: give the name of the file in the variable PGPASSFILE".into());
        }
        let given = |name: &str, of_environment: &str| parts.parameter(name).or_else(|| variable(of_environment));
        let must_write = match given(TARGET_SESSION_ATTRS, "PGTARGETSESSIONATTRS").as_deref() {
            None | Some("read-write" | "primary") => true,
            Some("any") => false,
            Some(other) => {
                return Err(format!(
                    "{TARGET_SESSION_ATTRS} is {other:?}: the daemon writes, so it must be read-write, primary or any"
                ));
            }
        };
        let is_random = match given(LOAD_BALANCE_HOSTS, "PGLOADBALANCEHOSTS").as_deref() {
            None | Some("disable") => false,
            Some("random") => true,
            Some(other) => {
                return Err(format!("{LOAD_BALANCE_HOSTS} is {other:?}, which is neither disable nor random"));
            }
        };
        let connect_timeout = match given(CONNECT_TIMEOUT, "PGCONNECT_TIMEOUT") {
            None => None,
            Some(seconds) => match seconds.trim().parse::<i32>() {
                Ok(seconds) => u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs),
                Err(_) => return Err(format!("{CONNECT_TIMEOUT} is {seconds:?}, which is not a number of seconds")),
            },
        };
        let mut hosts = parts.read_hosts(variable)?;
        if is_random {
            fastrand::shuffle(&mut hosts);
        }
        Ok(Self { hosts, must_write, connect_timeout })
    }
}

impl Parts<'_> {
    fn read_hosts(&self, variable: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Host>, String> {
        let [of_url, ports_of_url]: [Vec<String>; 2] = split_authority(self.hosts);
        let list = |text: String| text.split(',').map(|part| part.trim().to_owned()).collect::<Vec<_>>();
        let has_hosts =
            !self.hosts.is_empty() || self.parameter("host").is_some() || self.parameter("hostaddr").is_some();
        let of_environment = |name: &str| variable(name).filter(|_| !has_hosts).map(list);
        let names = self.parameter("host").map(list).or_else(|| (!self.hosts.is_empty()).then_some(of_url));
        let names = names.or_else(|| of_environment("PGHOST")).unwrap_or_default();
        let addresses =
            self.parameter("hostaddr").map(list).or_else(|| of_environment("PGHOSTADDR")).unwrap_or_default();
        let ports = self.parameter("port").map(list);
        let ports = ports.or_else(|| ports_of_url.iter().any(|port| !port.is_empty()).then_some(ports_of_url));
        let ports = ports.or_else(|| variable("PGPORT").map(list)).unwrap_or_default();

        let count = names.len().max(addresses.len());
        if count == 0 {
            // Neither a host nor an address: sqlx looks for a socket of this machine.
            let options = read_options(&self.with_host("", ports.first().map_or("", |port| port)))?;
            return Ok(vec![Host { place: place(&options), options }]);
        }
        if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
            return Err(format!("it names {} hosts and {} addresses", names.len(), addresses.len()));
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(format!(
                "it names {count} hosts and {} ports: give one port, or one for each host",
                ports.len()
            ));
        }
        let host = |index: usize| {
            let (name, address) = (names.get(index), addresses.get(index));
            let port = ports.get(index).or(ports.first()).filter(|port| !port.is_empty());
            if let Some(port) = port
                && !port.parse::<u16>().is_ok_and(|port| port > 0)
            {
                // Not with the text, which may be a part of a password.
                return Err("one of its ports is not a number from 1 to 65535".to_owned());
            }
            let Some(written) = name.or(address).filter(|host| !host.is_empty()) else {
                return Err("one of its hosts is empty".to_owned());
            };
            let mut options = read_options(&self.with_host(written, port.map_or("", |port| port)))?;
            if let Some(address) = address.filter(|address| !address.is_empty()) {
                address
                    .parse::<std::net::IpAddr>()
                    .map_err(|_| format!("hostaddr {address:?} is not an IP address"))?;
                options = options.host(address);
            } else if written.contains(':') && !written.starts_with('/') {
                // sqlx would look up the name with its brackets.
                options = options.host(written);
            }
            Ok(Host { place: place(&options), options })
        };
        (0..count).map(host).collect()
    }
}

/// The hosts and the ports before the path of a URL: `a:1,[::1]:2,c`.
fn split_authority(hosts: &str) -> [Vec<String>; 2] {
    let split = |host: &str| {
        let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, port)) => (decode(address), decode(port.strip_prefix(':').unwrap_or_default())),
            None => {
                host.rsplit_once(':').map_or((decode(host), String::new()), |(name, port)| (decode(name), decode(port)))
            }
        }
    };
    let (names, ports) = hosts.split(',').map(split).unzip();
    [names, ports]
}

fn read_options(url: &str) -> Result<PgConnectOptions, String> {
    PgConnectOptions::from_str(url).map_err(|error| match error {
        sqlx::Error::Configuration(source) => source.to_string(),
        error => error.to_string(),
    })
}

/// Host and port, for people.
pub(super) fn place(options: &PgConnectOptions) -> String {
    let socket = options.get_socket().map(|path| path.display().to_string());
    format!("{}:{}", socket.unwrap_or_else(|| options.get_host().to_owned()), options.get_port())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a URL means, in an environment of these variables.
    fn read(url: &str, variables: &[(&str, &str)]) -> Result<Hosts, String> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Hosts::parse(url, &variable)
    }

    fn places(url: &str, variables: &[(&str, &str)]) -> Vec<String> {
        let hosts = read(url, variables).unwrap_or_else(|error| panic!("{url}: {error}"));
        hosts.hosts.into_iter().map(|host| host.place).collect()
    }

    #[test]
    fn hosts_and_ports_are_read_as_libpq_reads_them() {
        for (url, expected) in [
            ("postgres://u:p@a/d", &["a:5432"][..]),
            ("postgres://u:p@a,b/d", &["a:5432", "b:5432"]),
            ("postgresql://u:a%40b@a:1,b:2,c/d?sslmode=disable", &["a:1", "b:2", "c:5432"]),
            ("postgres://[::1]:5433,10.0.0.1/d", &["::1:5433", "10.0.0.1:5432"]),
            ("postgres:///d?host=a,b&port=6000", &["a:6000", "b:6000"]),
            ("postgres:///d?host=a,b&port=6000,6001", &["a:6000", "b:6001"]),
            ("postgres://u@a,b/d?port=6000", &["a:6000", "b:6000"]),
            ("postgres:///d?host=/run/one,%2Frun%2Ftwo", &["/run/one:5432", "/run/two:5432"]),
            ("postgres://%2Frun%2Fone/d", &["/run/one:5432"]),
            ("postgres://a,b/d?hostaddr=10.0.0.1,10.0.0.2", &["10.0.0.1:5432", "10.0.0.2:5432"]),
            ("postgres:///d?hostaddr=10.0.0.1,fe80::1", &["10.0.0.1:5432", "fe80::1:5432"]),
        ] {
            assert_eq!(places(url, &[]), expected, "{url}");
        }
        let hosts = read("postgres://u:a%40b@a:1,b:2/d", &[]).expect("hosts");
        for host in hosts.hosts {
            assert_eq!((host.options.get_username(), host.options.get_database()), ("u", Some("d")));
        }
    }

    #[test]
    fn the_environment_fills_in_what_the_url_does_not_say() {
        let variables = [("PGHOST", "x,y"), ("PGPORT", "7000,7001"), ("PGTARGETSESSIONATTRS", "any")];
        assert_eq!(places("postgres:///d", &variables), ["x:7000", "y:7001"]);
        assert_eq!(places("postgres://a:1/d", &variables), ["a:1"]);
        assert!(!read("postgres:///d", &variables).expect("hosts").must_write);
        assert!(read("postgres:///d?target_session_attrs=primary", &variables).expect("hosts").must_write);
        let timeouts = ["", "?connect_timeout=0", "?connect_timeout=3"].map(|query| {
            read(&format!("postgres://a/d{query}"), &[("PGCONNECT_TIMEOUT", "7")]).expect("hosts").connect_timeout
        });
        assert_eq!(timeouts, [Some(7), None, Some(3)].map(|seconds| seconds.map(Duration::from_secs)));
    }

    #[test]
    fn a_session_must_take_writes_unless_any_server_will_do() {
        let must_write = |query: &str| read(&format!("postgres://a,b/d?{query}"), &[]).map(|hosts| hosts.must_write);
        assert_eq!(must_write(""), Ok(true));
        assert_eq!(must_write("target_session_attrs=read-write"), Ok(true));
        assert_eq!(must_write("target_session_attrs=any"), Ok(false));
    }

    #[test]
    fn mistakes_are_errors_that_name_the_part() {
        for (url, expected) in [
            ("postgres://a,b/d?target_session_attrs=standby", "target_session_attrs is \"standby\""),
            ("postgres://a,b/d?load_balance_hosts=yes", "load_balance_hosts is \"yes\""),
            ("postgres://a/d?connect_timeout=soon", "connect_timeout is \"soon\""),
            ("postgres://a:1,b:0/d", "one of its ports"),
            ("postgres://a:1,b:x/d", "one of its ports"),
            ("postgres://a,b,c/d?port=1,2", "3 hosts and 2 ports"),
            ("postgres://a,,c/d", "one of its hosts is empty"),
            ("postgres://a,b/d?hostaddr=10.0.0.1", "2 hosts and 1 addresses"),
            ("postgres://a/d?hostaddr=b", "hostaddr \"b\" is not an IP address"),
            ("postgres://a/d?service=main", "service is not supported"),
            ("postgres://a/d?passfile=/x", "PGPASSFILE"),
            ("postgres://a/d?sslmode=sometimes", "unknown value"),
        ] {
            let error = read(url, &[]).expect_err(url);
            assert!(error.contains(expected), "{url}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_error_contains_the_password_and_nothing_panics(before in "[ -~]{0,8}", after in "[ -~]{0,24}") {
            let url = format!("postgres://u:SECRET{before}@{after}");
            if let Err(error) = read(&url, &[]) {
                prop_assert!(!error.contains("SECRET"), "{}", error);
            }
        }
    }
}
