//! The nodes of RabbitMQ that `TIDINGS_AMQP_URL` names: a list of URLs, or one URL with several hosts.
//!
//! Each daemon begins at a random node, so that not all of them are on one, and goes on with the next one when it cannot use
//! a node or loses it. Each connection is to the host of its own URL, and its certificate must be for that host.
//!
//! Must never connect: `connection.rs` does.

use std::sync::atomic::{AtomicUsize, Ordering};

use lapin::uri::AMQPUri;

/// The scheme of a URL of RabbitMQ, with and without TLS.
const SCHEMES: [&str; 2] = ["amqp://", "amqps://"];

/// The nodes, and which of them is used.
#[derive(Debug)]
pub(super) struct Nodes {
    /// At least one.
    uris: Vec<AMQPUri>,
    current: AtomicUsize,
}

impl Nodes {
    /// Reads a list. The error is a sentence without the password.
    pub(super) fn parse(list: &str) -> Result<Self, String> {
        let mut uris = Vec::new();
        for url in split_list(list) {
            for url in split_hosts(url) {
                uris.push(url.parse::<AMQPUri>()?);
            }
        }
        let Some((first, others)) = uris.split_first() else { return Err("it names no host".into()) };
        if let Some(other) = others.iter().find(|other| other.vhost != first.vhost) {
            return Err(format!(
                "it names nodes of one cluster with two virtual hosts, {:?} and {:?}",
                first.vhost, other.vhost
            ));
        }
        for uri in &mut uris {
            // With RabbitMQ's default of 60 s, a dead link would look alive for two minutes.
            uri.query.heartbeat.get_or_insert(5);
            uri.query.connection_timeout.get_or_insert(5_000);
        }
        let current = AtomicUsize::new(fastrand::usize(..uris.len()));
        Ok(Self { uris, current })
    }

    /// The node that is used, or is tried next.
    pub(super) fn current(&self) -> &AMQPUri {
        &self.uris[self.current.load(Ordering::Relaxed)]
    }

    /// All nodes, the one that is used first, with their numbers.
    pub(super) fn in_turn(&self) -> impl Iterator<Item = (usize, &AMQPUri)> {
        let first = self.current.load(Ordering::Relaxed);
        (first..first + self.uris.len())
            .map(|number| number % self.uris.len())
            .map(|number| (number, &self.uris[number]))
    }

    /// Uses this node from now on.
    pub(super) fn use_node(&self, number: usize) {
        self.current.store(number, Ordering::Relaxed);
    }

    /// Whether there is another node than the one that is used.
    pub(super) fn has_others(&self) -> bool {
        self.uris.len() > 1
    }

    /// Begins at the next node when it connects again.
    pub(super) fn leave(&self) {
        self.use_node((self.current.load(Ordering::Relaxed) + 1) % self.uris.len());
    }
}

/// The URLs of a list. A comma within a URL separates hosts, or is a part of the password.
fn split_list(list: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = Vec::new();
    for (at, _) in list.char_indices() {
        let is_start = at == 0 || list[..at].trim_end().ends_with(',');
        if is_start && SCHEMES.iter().any(|scheme| list[at..].starts_with(scheme)) {
            starts.push(at);
        }
    }
    let ends = starts.iter().skip(1).copied().chain([list.len()]);
    starts.iter().zip(ends).map(|(start, end)| list[*start..end].trim().trim_end_matches(',')).collect()
}

/// One URL for each host of a URL such as `amqp://user:password@a,b:5673/vhost`.
fn split_hosts(url: &str) -> Vec<String> {
    let Some((scheme, rest)) = url.split_once("://") else { return vec![url.to_owned()] };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (userinfo, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    hosts.split(',').map(|host| format!("{scheme}://{userinfo}{}{tail}", host.trim())).collect()
}

/// Host, port and virtual host, for people.
pub(super) fn place(uri: &AMQPUri) -> String {
    format!("{}:{}/{}", uri.authority.host, uri.authority.port, uri.vhost.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn places(list: &str) -> Vec<String> {
        let nodes = Nodes::parse(list).unwrap_or_else(|error| panic!("{list}: {error}"));
        nodes.uris.iter().map(place).collect()
    }

    #[test]
    fn a_list_names_nodes_by_urls_or_by_hosts() {
        for (list, expected) in [
            ("amqp://u:p@a/v", &["a:5672/v"][..]),
            ("amqp://u:p@a,b:5673,c/v", &["a:5672/v", "b:5673/v", "c:5672/v"]),
            ("amqp://u:p@a/v,amqps://u:p@b/v", &["a:5672/v", "b:5671/v"]),
            ("amqp://u:p@a/v, amqp://u:p@b,c/v", &["a:5672/v", "b:5672/v", "c:5672/v"]),
            ("amqp://u:p,amqp@a:1/v?heartbeat=7", &["a:1/v"]),
        ] {
            assert_eq!(places(list), expected, "{list}");
        }
        let nodes = Nodes::parse("amqps://u:a%2Cb@a,b/v?heartbeat=7").expect("nodes");
        for uri in &nodes.uris {
            assert_eq!((&*uri.authority.userinfo.password, uri.query.heartbeat), ("a,b", Some(7)));
            assert_eq!(uri.scheme, lapin::uri::AMQPScheme::AMQPS);
        }
    }

    #[test]
    fn nodes_are_tried_in_turn_and_begin_at_any() {
        let nodes = Nodes::parse("amqp://a,b,c/v").expect("nodes");
        nodes.use_node(1);
        assert_eq!(nodes.in_turn().map(|(number, _)| number).collect::<Vec<_>>(), [1, 2, 0]);
        nodes.leave();
        nodes.leave();
        assert_eq!(place(nodes.current()), "a:5672/v");
        let beginnings: std::collections::BTreeSet<String> =
            (0..200).map(|_| place(Nodes::parse("amqp://a,b,c/v").expect("nodes").current())).collect();
        assert_eq!(beginnings.len(), 3);
    }

    #[test]
    fn mistakes_are_errors_that_name_the_part() {
        for (list, expected) in [("", "names no host"), ("amqp://a/v,amqp://b/w", "\"v\" and \"w\"")] {
            let error = Nodes::parse(list).expect_err(list);
            assert!(error.contains(expected), "{list}: {error}");
        }
        assert!(Nodes::parse("amqp://a,b:x/v").is_err());
    }

    proptest! {
        #[test]
        fn no_error_contains_the_password_and_nothing_panics(before in "[ -~]{0,8}", after in "[ -~]{0,24}") {
            if let Err(error) = Nodes::parse(&format!("amqp://u:SECRET{before}@{after}")) {
                prop_assert!(!error.contains("SECRET"), "{}", error);
            }
        }
    }
}
