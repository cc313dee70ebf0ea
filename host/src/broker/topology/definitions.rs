//! The daemon's topology as definitions for RabbitMQ to import, for an operator who declares it before the daemon
//! starts and gives the daemon's user only the permissions that it needs.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::broker::Broker;
use crate::broker::topology::{Argument, Binding, DeclaredEntity};
use crate::model::intake::Intake;

impl Broker {
    /// The exchanges, the queues, the binding, and the permissions of the daemon's user: the fewest that it needs, or,
    /// if it `declares` all of this itself, those that it needs for that as well. RabbitMQ can import the result when
    /// the virtual host and the user exist.
    #[must_use]
    pub fn definitions(&self, declares: bool) -> Value {
        let vhost = &self.uri().vhost;
        let definition = |entity: &DeclaredEntity| {
            let arguments = match entity.exchange_type() {
                Some(_) => json!({}),
                None => arguments(entity.arguments(&self.exchange, self.queue_type)),
            };
            let mut definition = json!({
                "vhost": vhost, "name": entity.name(&self.exchange), "durable": true, "auto_delete": false,
                "arguments": arguments,
            });
            if let Some(exchange_type) = entity.exchange_type() {
                definition["type"] = exchange_type.into();
                definition["internal"] = false.into();
            }
            definition
        };
        let all = DeclaredEntity::all(&self.exchange, &self.intakes);
        let (exchanges, queues): (Vec<_>, Vec<_>) = all
            .iter()
            // RabbitMQ's own exchanges are there.
            .filter(|entity| !entity.name(&self.exchange).starts_with("amq."))
            .partition(|entity| entity.exchange_type().is_some());
        let binding = |Binding { queue, source, key }: Binding| {
            json!({
                "vhost": vhost, "source": source.name(&self.exchange), "destination": queue.name(&self.exchange),
                "destination_type": "queue", "routing_key": key, "arguments": {},
            })
        };
        let bindings: Vec<_> = Binding::all(&self.intakes).into_iter().map(binding).collect();
        let [configure, write, read] = permission_patterns(&self.exchange, &self.intakes, declares);
        let user = &self.uri().authority.userinfo.username;
        json!({
            "exchanges": exchanges.into_iter().map(definition).collect::<Vec<_>>(),
            "queues": queues.into_iter().map(definition).collect::<Vec<_>>(),
            "bindings": bindings,
            "permissions": [{ "vhost": vhost, "user": user, "configure": configure, "write": write, "read": read }],
        })
    }
}

fn arguments(arguments: Vec<(&'static str, Argument)>) -> Value {
    let json = |(name, value): (&'static str, Argument)| match value {
        Argument::Text(text) => (name.to_owned(), Value::from(text)),
        Argument::Number(number) => (name.to_owned(), number.into()),
    };
    Value::Object(arguments.into_iter().map(json).collect())
}

/// The patterns for configure, write and read. The daemon publishes to its exchange, to those of its intakes and, by the names of
/// queues, to the default exchange, and it reads its queues. To bind, it must be allowed to write to the queue and to read from
/// the exchange; to declare a queue with a dead-letter exchange, to read the queue and to write to that exchange.
fn permission_patterns(exchange: &str, intakes: &[Arc<Intake>], declares: bool) -> [String; 3] {
    let name = escaped_name(exchange);
    let mut configure = vec![format!(r"{name}(\.dlx|\.dead|\.parking|\.fleet.*)?")];
    let (mut write, mut read);
    if declares {
        write = vec![name.clone(), format!(r"{name}\.dead"), format!(r"{name}\.fleet.*"), r"amq\.default".into()];
        read = vec![format!(r"{name}\.(dlx|dead|parking|fleet.*)")];
    } else {
        configure.clear();
        write = vec![name.clone(), r"amq\.default".into()];
        read = vec![format!(r"{name}\.(dead|parking)")];
    }
    if declares && !intakes.is_empty() {
        write.push(format!(r"{name}\.dlx"));
    }
    for intake in intakes {
        let [from, to, queue] = [&intake.from, &intake.to, &intake.queue(exchange)].map(|name| escaped_name(name));
        read.push(queue.clone());
        write.push(to.clone());
        if declares {
            read.push(from.clone());
            write.push(queue.clone());
            configure.extend([from, to, queue]);
        }
    }
    [configure, write, read].map(|names| match names.as_slice() {
        [] => "^$".to_owned(),
        [single] => format!("^{single}$"),
        several => format!("^({})$", several.join("|")),
    })
}

/// A regular expression that matches exactly this name, without anchors.
fn escaped_name(name: &str) -> String {
    let escape = |character: char| {
        let special = character.is_ascii_punctuation() && !matches!(character, '-' | '_');
        special.then_some('\\').into_iter().chain([character])
    };
    name.chars().flat_map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_permission_patterns() {
        assert_eq!(escaped_name("shop.v2-a_b"), r"shop\.v2-a_b");
        assert_eq!(permission_patterns("a.b", &[], false), ["^$", r"^(a\.b|amq\.default)$", r"^a\.b\.(dead|parking)$"]);
        let intake = Arc::new(Intake { from: "in".into(), to: "out".into() });
        let [configure, write, read] = permission_patterns("t", &[Arc::clone(&intake)], false);
        assert_eq!((&*configure, &*write), ("^$", r"^(t|amq\.default|out)$"));
        assert_eq!(read, r"^(t\.(dead|parking)|t\.intake\.in)$");
        let [configure, write, read] = permission_patterns("t", &[intake], true);
        assert_eq!(configure, r"^(t(\.dlx|\.dead|\.parking|\.fleet.*)?|in|out|t\.intake\.in)$");
        assert_eq!(write, r"^(t|t\.dead|t\.fleet.*|amq\.default|t\.dlx|out|t\.intake\.in)$");
        assert_eq!(read, r"^(t\.(dlx|dead|parking|fleet.*)|t\.intake\.in|in)$");
    }
}
