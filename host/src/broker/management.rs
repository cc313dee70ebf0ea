//! RabbitMQ's management API, for what AMQP does not tell: the policies of our queues, and alarms. Only `tidings doctor`
//! asks it, and it may be left out.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;
use thiserror::Error;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::{Broker, QueueType};
use crate::secret_url::SecretUrl;

/// For each question, everything included.
const DEADLINE: Duration = Duration::from_secs(10);
/// What a policy may say of a queue that makes letters vanish from it.
const LOSES: [&str; 6] =
    ["message-ttl", "max-length", "max-length-bytes", "expires", "overflow", "dead-letter-exchange"];
/// The same, of a quorum queue alone: the argument that the daemon declares with would not count, being higher.
const QUORUM_LOSES: &str = "delivery-limit";

/// Why it could not be asked.
#[derive(Debug, Error)]
pub enum ManagementError {
    /// It does not answer.
    #[error("could not ask RabbitMQ's management API at {place}")]
    Ask {
        /// Host and port.
        place: String,
        /// Why.
        #[source]
        source: ureq::Error,
    },
    /// It answers, and does not tell.
    #[error("RabbitMQ's management API at {place} answered with status {status}")]
    Status {
        /// Host and port.
        place: String,
        /// Which.
        status: u16,
    },
    /// It answers, and is something else.
    #[error("what answers at {place} is not RabbitMQ's management API")]
    Foreign {
        /// Host and port.
        place: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Where it is, and who we are there.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "it knows a password")]
pub struct Management {
    base: String,
    place: String,
    authorization: Option<String>,
}

/// What the policies say of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Their names.
    pub names: String,
    /// What of it makes letters vanish.
    pub loses: Vec<String>,
}

impl Management {
    /// Understands a URL.
    ///
    /// # Errors
    ///
    /// When it cannot, without the password in the answer.
    pub fn new(url: &SecretUrl) -> Result<Self, String> {
        let uri: ureq::http::Uri = url.expose().parse().map_err(|error| format!("{error}"))?;
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or("it names no host")?;
        let (host, port, authority) = (authority.host(), authority.port_u16(), authority.as_str());
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        if place.len() > host.len() && port.is_none() {
            return Err("its port is no number up to 65535".into());
        }
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain = |part| percent_decode_str(part).decode_utf8_lossy();
            format!("Basic {}", BASE64.encode(format!("{}:{}", plain(name), plain(password))))
        });
        let scheme = uri.scheme_str().unwrap_or("http");
        let base = format!("{scheme}://{place}{}", uri.path().trim_end_matches('/'));
        Ok(Self { base, place: place.to_owned(), authorization })
    }

    /// What the policies say of a queue, as far as it matters to us.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn policy(&self, broker: &Broker, queue: &str) -> Result<Policy, ManagementError> {
        let encoded = |name| utf8_percent_encode(name, NON_ALPHANUMERIC);
        let path = format!("/api/queues/{}/{}", encoded(&broker.uri.vhost), encoded(queue));
        match self.get(path).await? {
            (200, queue) => Ok(policy(&queue, broker.queue_type)),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// The alarms in effect in the cluster, in words: while there is one, nobody can publish.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub async fn alarms(&self) -> Result<Vec<String>, ManagementError> {
        match self.get("/api/health/checks/alarms".to_owned()).await? {
            (200, _) => Ok(Vec::new()),
            (503, answer) => Ok(alarms(&answer)),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    async fn get(&self, path: String) -> Result<(u16, Value), ManagementError> {
        let this = self.clone();
        // The client blocks; its deadline ends it.
        let asked = tokio::task::spawn_blocking(move || this.get_blocking(&path));
        asked.await.expect("asking does not panic")
    }

    fn get_blocking(&self, path: &str) -> Result<(u16, Value), ManagementError> {
        let failed = |source| ManagementError::Ask { place: self.place.clone(), source };
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(DEADLINE))
            .http_status_as_error(false)
            // It lies beside RabbitMQ, where no proxy is asked either.
            .proxy(None);
        if self.base.starts_with("https:") {
            // Whom this machine trusts, as for the other two servers.
            let roots = rustls_native_certs::load_native_certs().certs;
            let roots = roots.iter().map(|root| Certificate::from_der(root).to_owned());
            config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::from(roots)).build());
        }
        let mut request = config.build().new_agent().get(format!("{}{path}", self.base));
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let mut answer = request.call().map_err(failed)?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().map_err(failed)?;
        if !matches!(status, 200 | 503) {
            return Ok((status, Value::Null));
        }
        let value = serde_json::from_str(&text);
        let value = value.map_err(|source| ManagementError::Foreign { place: self.place.clone(), source })?;
        Ok((status, value))
    }
}

/// What matters of a queue as the API describes it.
fn policy(queue: &Value, queue_type: QueueType) -> Policy {
    let names = ["policy", "operator_policy"].iter().filter_map(|name| queue[name].as_str()).collect::<Vec<_>>();
    // Without a policy it is an empty list.
    let said = queue["effective_policy_definition"].as_object();
    let loses = said.into_iter().flatten().filter(|(name, _)| {
        LOSES.contains(&name.as_str()) || (queue_type == QueueType::Quorum && *name == QUORUM_LOSES)
    });
    Policy { names: names.join(" and "), loses: loses.map(|(name, value)| format!("{name} = {value}")).collect() }
}

/// What the API says when it is not well.
fn alarms(answer: &Value) -> Vec<String> {
    let words = |alarm: &Value| match (alarm["resource"].as_str(), alarm["node"].as_str()) {
        (Some(resource), Some(node)) => format!("{resource} of {node}"),
        _ => alarm.to_string(),
    };
    match answer["alarms"].as_array() {
        Some(alarms) => alarms.iter().map(words).collect(),
        None => vec![answer.to_string()],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn management(url: &str) -> Result<Management, String> {
        Management::new(&SecretUrl::from(url.to_owned()))
    }

    #[test]
    fn a_url_is_taken_apart_and_its_password_decoded() {
        let there = management("https://user:p%40ss@host:15671/rabbit/").expect("a URL");
        assert_eq!((there.base.as_str(), there.place.as_str()), ("https://host:15671/rabbit", "host:15671"));
        assert_eq!(there.authorization, Some(format!("Basic {}", BASE64.encode("user:p@ss"))));
        assert_eq!(management("http://host").expect("a URL").authorization, None);
    }

    #[test]
    fn a_url_that_cannot_be_understood_is_refused_without_its_password() {
        for url in ["http://user:secret@host:port", "http://user:secret@", "http://user:secret@ho st"] {
            let error = management(url).map(|there| there.base).expect_err(url);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_policy_matters_only_if_letters_vanish_by_it() {
        let none = json!({ "effective_policy_definition": [], "policy": null });
        assert!(policy(&none, QueueType::Classic).loses.is_empty());
        let bad = json!({
            "policy": "all",
            "operator_policy": "limits",
            "effective_policy_definition": { "message-ttl": 1000, "queue-mode": "lazy", "delivery-limit": 5 },
        });
        let classic = policy(&bad, QueueType::Classic);
        assert_eq!((classic.names.as_str(), classic.loses), ("all and limits", vec!["message-ttl = 1000".to_owned()]));
        assert_eq!(policy(&bad, QueueType::Quorum).loses.len(), 2);
    }

    #[test]
    fn alarms_are_named_by_resource_and_node() {
        let answer = json!({ "status": "failed", "alarms": [{ "resource": "memory", "node": "rabbit@one" }] });
        assert_eq!(alarms(&answer), ["memory of rabbit@one"]);
        assert_eq!(alarms(&json!({ "status": "failed" })).len(), 1);
    }
}
