//! A collector of traces over OTLP/HTTP that keeps every request, raw and decoded, or that misbehaves as a test asks.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span as Sent, span::SpanKind};
use prost::Message as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::authority::Identity;
use crate::eventually;

/// The response that accepts the spans.
const ACCEPTED: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";

/// How the collector responds.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// Accepts the spans.
    Accepts,
    /// Sends these bytes and then closes the connection.
    SendsAndCloses(&'static str),
    /// Never responds.
    Hangs,
}

/// A running collector.
#[derive(Debug)]
pub struct Collector {
    addr: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    _tasks: JoinSet<()>,
}

/// An HTTP request that the collector received.
#[derive(Clone, Debug)]
pub struct Request {
    /// The request line and the headers.
    pub head: String,
    /// The body, in Protobuf.
    pub body: Vec<u8>,
}

/// A span that the collector received.
#[derive(Clone, Debug)]
pub struct Span {
    /// Trace id and span id, as `traceparent` writes them: `0af7…-b7ad…`.
    pub ids: String,
    /// The span id of the parent; empty if there is none.
    pub parent: String,
    /// The name of the span.
    pub name: String,
    /// The kind of the span, such as `SPAN_KIND_PRODUCER`.
    pub kind: &'static str,
    /// The links: the ids of the linked span in the format of `ids`, and its trace state.
    pub links: Vec<(String, String)>,
    /// The attributes, with numbers written in decimal.
    pub attributes: BTreeMap<String, String>,
    /// The events, each with its time in nanoseconds since the Unix epoch.
    pub events: Vec<(String, u64)>,
    /// The start and the end, in nanoseconds since the Unix epoch.
    pub start_and_end_ns: (u64, u64),
    /// The message of the status, if the status is an error.
    pub error: Option<String>,
    /// The attributes of the resource, which identify the sender.
    pub sender: BTreeMap<String, String>,
}

impl Collector {
    /// Listens on a free port.
    pub async fn start(answer: Answer) -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), answer).await
    }

    /// Listens on `addr`, where an earlier collector has been dropped.
    ///
    /// # Panics
    ///
    /// When the port is in use.
    pub async fn start_at(addr: SocketAddr, answer: Answer) -> Self {
        let listener = TcpListener::bind(addr).await.expect("the port is free");
        let addr = listener.local_addr().expect("it is bound");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        let to = Arc::clone(&requests);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, answer, Arc::clone(&to)));
            }
        });
        Self { addr, requests, _tasks: tasks }
    }

    /// The address on which it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The URL for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Also accepts spans over TLS, with the certificate of `identity`, and returns the port.
    ///
    /// # Panics
    ///
    /// When no port is free.
    #[must_use]
    pub fn offer_tls(&self, identity: &Identity) -> u16 {
        let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).expect("a key");
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
        let config = Arc::new(config.expect("they belong together"));
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let requests = Arc::clone(&self.requests);
        // The thread runs until this program ends.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = ServerConnection::new(Arc::clone(&config)).expect("a connection");
                let mut stream = StreamOwned::new(connection, stream.expect("a client"));
                let (mut bytes, mut some) = (Vec::new(), [0; 4096]);
                while let Ok(count @ 1..) = stream.read(&mut some) {
                    bytes.extend_from_slice(&some[..count]);
                    while let Some(request) = take_request(&mut bytes) {
                        requests.lock().expect("no holder of the lock panics").push(request);
                        let _ = stream.write_all(ACCEPTED.as_bytes());
                    }
                }
            }
        });
        port
    }

    /// All requests that were received so far.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no holder of the lock panics").clone()
    }

    /// Whether `text` occurs in the head or the body of any request.
    #[must_use]
    pub fn was_sent(&self, text: &str) -> bool {
        let holds = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        self.requests().iter().any(|request| holds(request.head.as_bytes()) || holds(&request.body))
    }

    /// All spans that were received so far.
    ///
    /// # Panics
    ///
    /// When a request is not an export of traces.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for request in self.requests() {
            let request = ExportTraceServiceRequest::decode(&*request.body).expect("an export of traces");
            for of_resource in request.resource_spans {
                let sender = attributes(of_resource.resource.map(|resource| resource.attributes).unwrap_or_default());
                let sent = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
                spans.extend(sent.map(|span| decode_span(span, sender.clone())));
            }
        }
        spans
    }

    /// Waits until `count` spans have this value of an attribute, and returns them.
    ///
    /// # Panics
    ///
    /// When there are more than `count`, or not enough in time.
    pub async fn wait_for_spans(&self, attribute: &str, value: &str, count: usize) -> Vec<Span> {
        eventually(&format!("{count} spans whose {attribute} is {value}"), async || {
            let mut spans = self.spans();
            spans.retain(|span| span.attributes.get(attribute).is_some_and(|is| is == value));
            assert!(spans.len() <= count, "more than {count}: {spans:#?}");
            (spans.len() == count).then_some(spans)
        })
        .await
    }

    /// Waits for the only span with this value of an attribute.
    ///
    /// # Panics
    ///
    /// As [`Collector::wait_for_spans`].
    pub async fn wait_for_span(&self, attribute: &str, value: &str) -> Span {
        self.wait_for_spans(attribute, value, 1).await.remove(0)
    }
}

/// Reads requests and responds to them until one side closes the connection.
async fn serve(mut stream: TcpStream, answer: Answer, requests: Arc<Mutex<Vec<Request>>>) {
    let mut bytes = Vec::new();
    while stream.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
        while let Some(request) = take_request(&mut bytes) {
            requests.lock().expect("no holder of the lock panics").push(request);
            let text = match answer {
                Answer::Accepts => ACCEPTED,
                Answer::SendsAndCloses(text) => text,
                Answer::Hangs => std::future::pending().await,
            };
            // Writing fails if the daemon was stopped meanwhile.
            if stream.write_all(text.as_bytes()).await.is_err() || matches!(answer, Answer::SendsAndCloses(_)) {
                return;
            }
        }
    }
}

/// Removes the first request from `bytes` and returns it, if it is complete.
fn take_request(bytes: &mut Vec<u8>) -> Option<Request> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8(bytes[..head].to_vec()).expect("a head of ASCII");
    let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with("content-length:")).expect("a length");
    let length: usize = line["content-length:".len()..].trim().parse().expect("a number");
    let body = bytes.get(head..head + length)?.to_vec();
    bytes.drain(..head + length);
    Some(Request { head: text, body })
}

fn decode_span(span: Sent, sender: BTreeMap<String, String>) -> Span {
    let ids = |trace_id: &[u8], span_id: &[u8]| format!("{}-{}", hex(trace_id), hex(span_id));
    let status = span.status.filter(|status| status.code == StatusCode::Error as i32);
    Span {
        ids: ids(&span.trace_id, &span.span_id),
        parent: hex(&span.parent_span_id),
        kind: SpanKind::try_from(span.kind).expect("a kind").as_str_name(),
        name: span.name,
        links: span.links.into_iter().map(|link| (ids(&link.trace_id, &link.span_id), link.trace_state)).collect(),
        attributes: attributes(span.attributes),
        events: span.events.into_iter().map(|event| (event.name, event.time_unix_nano)).collect(),
        start_and_end_ns: (span.start_time_unix_nano, span.end_time_unix_nano),
        error: status.map(|status| status.message),
        sender,
    }
}

/// The attributes by name. Panics when a name occurs twice.
fn attributes(sent: Vec<KeyValue>) -> BTreeMap<String, String> {
    let mut attributes = BTreeMap::new();
    for KeyValue { key, value, .. } in sent {
        let value = match value {
            Some(AnyValue { value: Some(Value::StringValue(text)) }) => text,
            Some(AnyValue { value: Some(Value::IntValue(number)) }) => number.to_string(),
            other => panic!("{key} is {other:?}"),
        };
        assert_eq!(attributes.insert(key.clone(), value), None, "{key} is there twice");
    }
    attributes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}
