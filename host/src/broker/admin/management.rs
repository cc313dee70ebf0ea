//! A client of RabbitMQ's management API, for what AMQP does not tell: the types and policies of the daemon's queues,
//! whether `tidings.dead` is bound, and alarms. The API is optional: without its URL in the settings nothing asks it.

use std::collections::BTreeSet;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::Value;
use thiserror::Error;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::broker::{Broker, DeclaredEntity, QueueType};
use crate::model::secrets::SecretUrl;

/// How long one request may take, from the connection to the end of the answer.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// The keys of a policy that make RabbitMQ remove messages from a queue.
const LOSSY_KEYS: [&str; 6] =
    ["message-ttl", "max-length", "max-length-bytes", "expires", "overflow", "dead-letter-exchange"];
/// The delivery limit with which the daemon declares quorum queues, and which no message reaches.
const UNREACHABLE_LIMIT: i64 = i32::MAX as i64;

/// Why the management API gave no usable answer.
#[derive(Debug, Error)]
pub enum ManagementError {
    /// It did not answer.
    #[error("could not ask RabbitMQ's management API at {place}")]
    Ask {
        /// Host and port.
        place: String,
        /// The HTTP client's error.
        #[source]
        source: ureq::Error,
    },
    /// It answered with an unexpected status.
    #[error("RabbitMQ's management API at {place} answered with status {status}")]
    Status {
        /// Host and port.
        place: String,
        /// The HTTP status.
        status: u16,
    },
    /// It answered with something that is not JSON.
    #[error("what answers at {place} is not RabbitMQ's management API")]
    NotJson {
        /// Host and port.
        place: String,
        /// What is wrong with the JSON.
        #[source]
        source: serde_json::Error,
    },
}

/// The address of the management API, and the login for it.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "it contains a password")]
pub struct Management {
    /// The URL without user and password, and without a slash at the end.
    base_url: String,
    /// Host and port, for errors.
    place: String,
    /// The value of the header `Authorization`.
    authorization: Option<String>,
}

/// What the management API says of one of the daemon's queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// The names of its policies.
    pub policies: String,
    /// The settings in them that remove messages, such as `max-length = 10`.
    pub lossy_settings: Vec<String>,
    /// `classic`, `quorum` or another.
    pub queue_type: String,
    /// How often a message may come back before RabbitMQ drops it, by an argument, a policy, or the default of RabbitMQ
    /// 4; `None` = there is no such limit, or no message reaches it.
    pub delivery_limit: Option<i64>,
    /// Whether the API knows its policies yet, which takes some seconds after the queue was declared.
    pub has_policies: bool,
}

impl Management {
    /// The API at the URL of the settings.
    ///
    /// # Panics
    ///
    /// If `url` is not a URL that [`Management::new`] accepts; the configuration checks it before.
    #[must_use]
    pub fn of(url: &SecretUrl) -> Self {
        Self::new(url).expect("the configuration accepts only URLs that can be understood")
    }

    /// Parses the URL of a management API.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, without the password.
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
            let decode = |part| percent_decode_str(part).decode_utf8_lossy();
            format!("Basic {}", BASE64.encode(format!("{}:{}", decode(name), decode(password))))
        });
        let scheme = uri.scheme_str().unwrap_or("http");
        let base_url = format!("{scheme}://{place}{}", uri.path().trim_end_matches('/'));
        Ok(Self { base_url, place: place.to_owned(), authorization })
    }

    /// Asks for one of the daemon's queues; `None` = it does not exist.
    ///
    /// # Errors
    ///
    /// When the API gives no usable answer.
    pub async fn queue(&self, broker: &Broker, entity: &DeclaredEntity) -> Result<Option<QueueInfo>, ManagementError> {
        let path = format!("/api/queues/{}/{}", encoded(&broker.uri().vhost), encoded(&entity.name(&broker.exchange)));
        match self.get(path).await? {
            (200, queue) => Ok(Some(QueueInfo::from_json(&queue))),
            (404, _) => Ok(None),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// Whether `tidings.dead` is bound to `tidings.dlx`.
    ///
    /// # Errors
    ///
    /// When the API gives no usable answer.
    pub async fn is_bound(&self, broker: &Broker) -> Result<bool, ManagementError> {
        let [source, queue] = [DeclaredEntity::DeadLetterExchange, DeclaredEntity::DeadQueue]
            .map(|entity| encoded(&entity.name(&broker.exchange)));
        match self.get(format!("/api/bindings/{}/e/{source}/q/{queue}", encoded(&broker.uri().vhost))).await? {
            (200, bindings) => Ok(bindings.as_array().is_some_and(|bindings| !bindings.is_empty())),
            (404, _) => Ok(false),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// The names of the queues and exchanges that are bound to an exchange.
    ///
    /// # Errors
    ///
    /// When the API gives no usable answer.
    pub async fn bound_to(&self, broker: &Broker, exchange: &str) -> Result<BTreeSet<String>, ManagementError> {
        let path = format!("/api/exchanges/{}/{}/bindings/source", encoded(&broker.uri().vhost), encoded(exchange));
        let name = |binding: &Value| binding["destination"].as_str().map(str::to_owned);
        match self.get(path).await? {
            (200, bindings) => Ok(bindings.as_array().into_iter().flatten().filter_map(name).collect()),
            (404, _) => Ok(BTreeSet::new()),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    /// The alarms in effect in the cluster, in words. While there is one, RabbitMQ takes no messages.
    ///
    /// # Errors
    ///
    /// When the API gives no usable answer.
    pub async fn alarms(&self) -> Result<Vec<String>, ManagementError> {
        match self.get("/api/health/checks/alarms".to_owned()).await? {
            (200, _) => Ok(Vec::new()),
            (503, answer) => Ok(describe_alarms(&answer)),
            (status, _) => Err(ManagementError::Status { place: self.place.clone(), status }),
        }
    }

    async fn get(&self, path: String) -> Result<(u16, Value), ManagementError> {
        let this = self.clone();
        // The HTTP client blocks its thread, at most until its deadline.
        let answer = tokio::task::spawn_blocking(move || this.get_blocking(&path));
        answer.await.expect("the request does not panic")
    }

    fn get_blocking(&self, path: &str) -> Result<(u16, Value), ManagementError> {
        let failed = |source| ManagementError::Ask { place: self.place.clone(), source };
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(REQUEST_DEADLINE))
            .http_status_as_error(false)
            // No proxy, as for the AMQP connection.
            .proxy(None);
        if self.base_url.starts_with("https:") {
            // The certificates that this machine trusts, as for the other two servers.
            let roots = rustls_native_certs::load_native_certs().certs;
            let roots = roots.iter().map(|root| Certificate::from_der(root).to_owned());
            config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::from(roots)).build());
        }
        let mut request = config.build().new_agent().get(format!("{}{path}", self.base_url));
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
        let value = value.map_err(|source| ManagementError::NotJson { place: self.place.clone(), source })?;
        Ok((status, value))
    }
}

impl Broker {
    /// What is wrong with one of the daemon's queues: a sentence for each setting that removes messages, and for
    /// another type than the settings ask for, with what to do.
    #[must_use]
    pub fn complaints(&self, entity: &DeclaredEntity, queue: &QueueInfo) -> Vec<String> {
        queue.complaints(entity, &self.exchange, self.queue_type)
    }
}

impl QueueInfo {
    fn complaints(&self, entity: &DeclaredEntity, exchange: &str, queue_type: QueueType) -> Vec<String> {
        let (what, name) = (entity.describe(exchange), entity.name(exchange));
        let mut complaints = Vec::new();
        if self.queue_type != queue_type.name() {
            complaints.push(format!(
                "{what} is of the type {}, and TIDINGS_QUEUE_TYPE asks for {}: stop the daemons, empty it (`tidings dead replay`, `tidings parked retry --all`) and delete it",
                self.queue_type,
                queue_type.name()
            ));
        }
        if !self.lossy_settings.is_empty() {
            complaints.push(format!(
                "the policy {} removes messages from {what} ({}), and they are lost: change its pattern so that it does not match this queue",
                self.policies,
                self.lossy_settings.join(", ")
            ));
        }
        if let Some(limit) = self.delivery_limit {
            let by = if self.policies.is_empty() {
                "by its argument, or by default".to_owned()
            } else {
                format!("see the policy {}", self.policies)
            };
            complaints.push(format!(
                "RabbitMQ drops a message in {what} when it has come back {limit} times ({by}), and each listing and each pass that breaks off makes messages come back: give the queue a policy with a limit that is never reached, such as {{\"delivery-limit\": {UNREACHABLE_LIMIT}}} for ^{}$, with a higher priority than all others, and no lower limit in an operator policy",
                name.replace('.', "\\.")
            ));
        }
        complaints
    }
}

fn encoded(name: &str) -> String {
    utf8_percent_encode(name, NON_ALPHANUMERIC).to_string()
}

impl QueueInfo {
    fn from_json(queue: &Value) -> Self {
        let names = ["policy", "operator_policy"].iter().filter_map(|name| queue[name].as_str()).collect::<Vec<_>>();
        // Without a policy it is an empty list.
        let policy = &queue["effective_policy_definition"];
        let settings = policy.as_object().into_iter().flatten();
        let lossy_settings = settings.filter(|(key, _)| LOSSY_KEYS.contains(&key.as_str()));
        let queue_type = queue["type"].as_str().unwrap_or("classic").to_owned();
        let limit = if queue_type != "quorum" {
            None
        } else if queue["delivery_limit"].is_null() {
            // Before 4.0 there is no default, and the API does not say which limit applies: the lower of argument and
            // policy.
            let (argument, policy) = (&queue["arguments"]["x-delivery-limit"], &policy["delivery-limit"]);
            [argument, policy].into_iter().filter_map(Value::as_i64).min()
        } else {
            // `unlimited`, or a number.
            queue["delivery_limit"].as_i64()
        };
        Self {
            policies: names.join(" and "),
            lossy_settings: lossy_settings.map(|(key, value)| format!("{key} = {value}")).collect(),
            queue_type,
            delivery_limit: limit.filter(|limit| *limit < UNREACHABLE_LIMIT),
            has_policies: !policy.is_null(),
        }
    }
}

/// The alarms in the API's answer, each as `memory of rabbit@host`.
fn describe_alarms(answer: &Value) -> Vec<String> {
    let describe = |alarm: &Value| match (alarm["resource"].as_str(), alarm["node"].as_str()) {
        (Some(resource), Some(node)) => format!("{resource} of {node}"),
        _ => alarm.to_string(),
    };
    match answer["alarms"].as_array() {
        Some(alarms) => alarms.iter().map(describe).collect(),
        None => vec![answer.to_string()],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(url: &str) -> Result<Management, String> {
        Management::new(&SecretUrl::from(url.to_owned()))
    }

    #[test]
    fn a_url_is_split_and_its_password_is_decoded() {
        let parsed = parse("https://user:p%40ss@host:15671/rabbit/").expect("a URL");
        assert_eq!((parsed.base_url.as_str(), parsed.place.as_str()), ("https://host:15671/rabbit", "host:15671"));
        assert_eq!(parsed.authorization, Some(format!("Basic {}", BASE64.encode("user:p@ss"))));
        assert_eq!(parse("http://host").expect("a URL").authorization, None);
    }

    #[test]
    fn the_error_for_an_invalid_url_does_not_contain_the_password() {
        for url in ["http://user:secret@host:port", "http://user:secret@", "http://user:secret@ho st"] {
            let error = parse(url).map(|parsed| parsed.base_url).expect_err(url);
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn only_policy_settings_that_remove_messages_are_reported() {
        let no_policy = json!({ "type": "classic", "effective_policy_definition": [], "policy": null });
        assert!(QueueInfo::from_json(&no_policy).lossy_settings.is_empty());
        let lossy = json!({
            "type": "classic",
            "policy": "all",
            "operator_policy": "limits",
            "effective_policy_definition": { "message-ttl": 1000, "queue-mode": "lazy", "delivery-limit": 5 },
        });
        let QueueInfo { policies, lossy_settings, delivery_limit, .. } = QueueInfo::from_json(&lossy);
        assert_eq!(
            (&*policies, lossy_settings, delivery_limit),
            ("all and limits", vec!["message-ttl = 1000".to_owned()], None)
        );
    }

    #[test]
    fn the_lowest_delivery_limit_applies_and_the_daemons_own_is_not_reported() {
        let reported_limit = |argument: Value, policy: Value, effective: Value| {
            let queue = json!({
                "type": "quorum",
                "arguments": { "x-delivery-limit": argument },
                "effective_policy_definition": { "delivery-limit": policy },
                "delivery_limit": effective,
            });
            QueueInfo::from_json(&queue).delivery_limit
        };
        let null = Value::Null;
        for (argument, policy, effective, limit) in [
            (&null, &null, &null, None),
            (&null, &null, &json!(20), Some(20)),
            (&json!(UNREACHABLE_LIMIT), &null, &null, None),
            (&json!(UNREACHABLE_LIMIT), &json!(5), &null, Some(5)),
            (&json!(3), &json!(5), &null, Some(3)),
            (&json!(UNREACHABLE_LIMIT), &null, &json!(UNREACHABLE_LIMIT), None),
            (&json!(UNREACHABLE_LIMIT), &json!(5), &json!(5), Some(5)),
            (&null, &json!(-1), &json!("unlimited"), None),
        ] {
            assert_eq!(
                reported_limit(argument.clone(), policy.clone(), effective.clone()),
                limit,
                "{argument} {policy} {effective}"
            );
        }
    }

    #[test]
    fn a_complaint_names_the_queue_and_what_to_do() {
        let healthy = QueueInfo {
            policies: String::new(),
            lossy_settings: Vec::new(),
            queue_type: "quorum".into(),
            delivery_limit: None,
            has_policies: true,
        };
        assert!(healthy.complaints(&DeclaredEntity::DeadQueue, "shop", QueueType::Quorum).is_empty());
        let lossy_settings = vec!["expires = 1".into()];
        let bad = QueueInfo { lossy_settings, policies: "all".into(), delivery_limit: Some(20), ..healthy };
        let complaints = bad.complaints(&DeclaredEntity::DeadQueue, "shop", QueueType::Classic);
        assert_eq!(complaints.len(), 3, "{complaints:?}");
        assert!(complaints.iter().all(|complaint| complaint.contains("the queue shop.dead")), "{complaints:?}");
        assert!(complaints[2].contains(r#"{"delivery-limit": 2147483647} for ^shop\.dead$"#), "{complaints:?}");
    }

    #[test]
    fn alarms_are_named_by_resource_and_node() {
        let answer = json!({ "status": "failed", "alarms": [{ "resource": "memory", "node": "rabbit@one" }] });
        assert_eq!(describe_alarms(&answer), ["memory of rabbit@one"]);
        assert_eq!(describe_alarms(&json!({ "status": "failed" })).len(), 1);
    }
}
