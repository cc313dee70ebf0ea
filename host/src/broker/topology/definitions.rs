//! What is ours, as definitions for RabbitMQ: for who declares it before the daemon comes, and lets its user do no more than
//! it needs.

use serde_json::{Value, json};

use crate::broker::topology::OwnEntity;
use crate::broker::{Broker, QueueType};

impl Broker {
    /// Exchanges, queues, the binding, and the permissions of our user: the fewest, with which it declares nothing, or those
    /// with which it `declares` all of this by itself. RabbitMQ imports it into the virtual host if that and the user are
    /// there.
    #[must_use]
    pub fn definitions(&self, declares: bool) -> Value {
        let vhost = &self.uri.vhost;
        let thing = |own: OwnEntity| {
            let mut thing = json!({
                "vhost": vhost, "name": own.name(&self.exchange), "durable": true, "auto_delete": false,
                "arguments": if own.kind().is_some() { json!({}) } else { arguments(self.queue_type) },
            });
            if let Some(kind) = own.kind() {
                thing["type"] = kind.into();
                thing["internal"] = false.into();
            }
            thing
        };
        let (exchanges, queues): (Vec<_>, Vec<_>) = OwnEntity::ALL.into_iter().partition(|own| own.kind().is_some());
        let binding = json!({
            "vhost": vhost, "source": OwnEntity::DeadLetterExchange.name(&self.exchange),
            "destination": OwnEntity::Dead.name(&self.exchange), "destination_type": "queue",
            "routing_key": "", "arguments": {},
        });
        let [configure, write, read] = patterns(&self.exchange, declares);
        let user = &self.uri.authority.userinfo.username;
        json!({
            "exchanges": exchanges.into_iter().map(thing).collect::<Vec<_>>(),
            "queues": queues.into_iter().map(thing).collect::<Vec<_>>(),
            "bindings": [binding],
            "permissions": [{ "vhost": vhost, "user": user, "configure": configure, "write": write, "read": read }],
        })
    }
}

fn arguments(queue_type: QueueType) -> Value {
    let mut arguments = json!({ "x-queue-type": queue_type.name() });
    if let Some(limit) = queue_type.delivery_limit() {
        arguments["x-delivery-limit"] = limit.into();
    }
    arguments
}

/// What our user may configure, write and read. It publishes to the exchange and, by the names of queues, to the default
/// exchange; it reads both queues. Who binds writes to the queue and reads from the exchange.
fn patterns(exchange: &str, declares: bool) -> [String; 3] {
    let name = pattern(exchange);
    if declares {
        [
            format!(r"^{name}(\.dlx|\.dead|\.parking)?$"),
            format!(r"^({name}|{name}\.dead|amq\.default)$"),
            format!(r"^{name}\.(dlx|dead|parking)$"),
        ]
    } else {
        ["^$".into(), format!(r"^({name}|amq\.default)$"), format!(r"^{name}\.(dead|parking)$")]
    }
}

/// A name as a regular expression that matches nothing else.
fn pattern(name: &str) -> String {
    let escaped = |character: char| {
        let special = character.is_ascii_punctuation() && !matches!(character, '-' | '_');
        special.then_some('\\').into_iter().chain([character])
    };
    name.chars().flat_map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_matched_by_itself_and_by_nothing_else() {
        assert_eq!(pattern("shop.v2-a_b"), r"shop\.v2-a_b");
        assert_eq!(patterns("a.b", false)[1], r"^(a\.b|amq\.default)$");
    }
}
