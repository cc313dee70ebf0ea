//! Opens a connection for publishing: TCP, TLS if the URL asks for it, and the protocol's handshake.
//!
//! Must never log or return the password.

use amq_protocol::auth::Credentials;
use amq_protocol::frame::{AMQPFrame, ProtocolVersion};
use amq_protocol::protocol::{AMQPClass, connection};
use async_rs::{Runtime, Tokio};
use futures_util::{AsyncReadExt as _, AsyncWriteExt as _};
use lapin::tcp::{AMQPUriTcpExt as _, AsyncTcpStream};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::{AMQPUri, SASLMechanism};

use crate::broker::publishing::error::{PublishError, closed_connection};
use crate::broker::publishing::incoming::Incoming;
use crate::broker::publishing::session::{write, write_frame};

/// The transport, with or without TLS.
pub(in crate::broker) type Stream = AsyncTcpStream<<Tokio as async_rs::traits::Reactor>::TcpStream>;

/// What was agreed on. 0 is no limit, and no heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreement {
    pub(super) max_channels: u16,
    pub(super) max_frame_bytes: u32,
    /// In seconds.
    pub(super) heartbeat: u16,
}

/// Opens the transport.
pub(in crate::broker) async fn connect(uri: &AMQPUri) -> std::io::Result<Stream> {
    uri.connect_async(&Runtime::tokio_current()).await
}

/// Logs in and opens the virtual host. `name` is the connection's name in RabbitMQ's management UI.
pub(super) async fn shake_hands(
    stream: &mut Stream,
    incoming: &mut Incoming,
    uri: &AMQPUri,
    name: &str,
) -> Result<Agreement, PublishError> {
    use connection::AMQPMethod::{Close, OpenOk, Secure, Start, Tune};
    send(stream, &AMQPFrame::ProtocolHeader(ProtocolVersion::amqp_0_9_1())).await?;
    let credentials = Credentials::from(uri.authority.userinfo.clone());
    let mechanism = uri.query.auth_mechanism.unwrap_or_default();
    let mut agreement = None;
    loop {
        let method = match receive(stream, incoming).await? {
            AMQPFrame::Method(0, AMQPClass::Connection(method)) => method,
            AMQPFrame::ProtocolHeader(version) => {
                return Err(PublishError::protocol(format!("it speaks only AMQP {version}")));
            }
            AMQPFrame::Heartbeat => continue,
            other => return Err(PublishError::protocol(format!("an unexpected frame: {other}"))),
        };
        let answer = match method {
            Start(_) => connection::AMQPMethod::StartOk(connection::StartOk {
                client_properties: client_properties(name),
                mechanism: mechanism.name().into(),
                response: credentials.sasl_auth_string(mechanism),
                locale: "en_US".into(),
            }),
            Secure(_) if mechanism == SASLMechanism::RabbitCrDemo => {
                connection::AMQPMethod::SecureOk(connection::SecureOk { response: credentials.rabbit_cr_demo_answer() })
            }
            Tune(tune) => {
                let agreed = agree(uri, &tune);
                agreement = Some(agreed);
                let Agreement { max_channels, max_frame_bytes, heartbeat } = agreed;
                let tuned = connection::TuneOk { channel_max: max_channels, frame_max: max_frame_bytes, heartbeat };
                send_method(stream, connection::AMQPMethod::TuneOk(tuned)).await?;
                connection::AMQPMethod::Open(connection::Open { virtual_host: uri.vhost.as_str().into() })
            }
            OpenOk(_) => {
                return agreement
                    .ok_or_else(|| PublishError::protocol("the connection was opened before it was tuned"));
            }
            Close(close) => {
                let _ = send_method(stream, connection::AMQPMethod::CloseOk(connection::CloseOk {})).await;
                return Err(closed_connection(&close));
            }
            other => return Err(PublishError::protocol(format!("an unexpected method: {other:?}"))),
        };
        send_method(stream, answer).await?;
    }
}

/// The smaller of what each side wants, where 0 is no limit; and the server's heartbeat if we want none.
fn agree(uri: &AMQPUri, tune: &connection::Tune) -> Agreement {
    fn smaller<T: Copy + Default + Ord>(ours: Option<T>, theirs: T) -> T {
        let limits = [ours.unwrap_or_default(), theirs].into_iter().filter(|limit| *limit != T::default());
        limits.min().unwrap_or_default()
    }
    Agreement {
        max_channels: smaller(uri.query.channel_max, tune.channel_max),
        max_frame_bytes: smaller(uri.query.frame_max, tune.frame_max),
        heartbeat: smaller(uri.query.heartbeat, tune.heartbeat),
    }
}

/// What we tell RabbitMQ of ourselves. Without a capability it would not tell us that it blocks the connection, for
/// instance (source: RabbitMQ's documentation, "AMQP 0-9-1 connections", client properties).
fn client_properties(name: &str) -> FieldTable {
    let mut capabilities = FieldTable::default();
    for capability in ["publisher_confirms", "basic.nack", "connection.blocked", "authentication_failure_close"] {
        capabilities.insert(capability.into(), AMQPValue::Boolean(true));
    }
    let mut properties = FieldTable::default();
    for (key, value) in [
        ("product", "tidings"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("platform", "Rust"),
        ("connection_name", name),
    ] {
        properties.insert(key.into(), AMQPValue::LongString(value.into()));
    }
    properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities));
    properties
}

async fn send_method(stream: &mut Stream, method: connection::AMQPMethod) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    write(&mut bytes, 0, AMQPClass::Connection(method));
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn send(stream: &mut Stream, frame: &AMQPFrame) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, frame);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn receive(stream: &mut Stream, incoming: &mut Incoming) -> Result<AMQPFrame, PublishError> {
    loop {
        if let Some(frame) = incoming.next_frame()? {
            return Ok(frame);
        }
        let read = stream.read(incoming.space()).await?;
        incoming.filled(read)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_limit_is_agreed_on_and_0_is_no_limit() {
        let uri = |query: &str| format!("amqp://localhost/%2f?{query}").parse::<AMQPUri>().expect("a URL");
        let agreed = |query, channel_max, frame_max, heartbeat| {
            let Agreement { max_channels, max_frame_bytes, heartbeat } =
                agree(&uri(query), &connection::Tune { channel_max, frame_max, heartbeat });
            (max_channels, max_frame_bytes, heartbeat)
        };
        assert_eq!(agreed("", 2047, 131_072, 60), (2047, 131_072, 60));
        assert_eq!(agreed("heartbeat=10&frame_max=8192&channel_max=4", 2047, 131_072, 60), (4, 8192, 10));
        assert_eq!(agreed("heartbeat=0", 0, 0, 60), (0, 0, 60));
        assert_eq!(agreed("heartbeat=10", 0, 0, 0), (0, 0, 10));
    }
}
