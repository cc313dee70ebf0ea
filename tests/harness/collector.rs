//! Somebody who collects traces over OTLP/HTTP, or does not: keeps what it was sent, as it came and decoded.

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

/// That it has the spans.
const TAKEN: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";

/// What it answers.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// That it has the spans.
    Takes,
    /// These bytes, behind which it hangs up.
    Says(&'static str),
    /// Nothing, ever.
    Never,
}

/// A collector on a port of its own.
#[derive(Debug)]
pub struct Collector {
    addr: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    _tasks: JoinSet<()>,
}

/// What it was sent once.
#[derive(Clone, Debug)]
pub struct Request {
    /// The request line and the headers.
    pub head: String,
    /// Protobuf.
    pub body: Vec<u8>,
}

/// A span that it was sent.
#[derive(Clone, Debug)]
pub struct Span {
    /// Trace id and span id, as `traceparent` writes them: `0af7…-b7ad…`.
    pub ids: String,
    /// The span id of its parent; empty = it has none.
    pub parent: String,
    /// Its name.
    pub name: String,
    /// What it is, such as `SPAN_KIND_PRODUCER`.
    pub kind: &'static str,
    /// What it is linked to: ids as above, and the trace state.
    pub links: Vec<(String, String)>,
    /// Its attributes, numbers in decimal.
    pub attributes: BTreeMap<String, String>,
    /// Its events, each with its nanoseconds since the Unix epoch.
    pub events: Vec<(String, u64)>,
    /// From when to when, in nanoseconds since the Unix epoch.
    pub lasted: (u64, u64),
    /// What went wrong, if something did.
    pub error: Option<String>,
    /// Who sent it: the attributes of the resource.
    pub sender: BTreeMap<String, String>,
}

impl Collector {
    /// Listens on any port that is free.
    pub async fn start(answer: Answer) -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0)), answer).await
    }

    /// Listens where a collector was that is gone.
    ///
    /// # Panics
    ///
    /// When the port is taken.
    pub async fn at(addr: SocketAddr, answer: Answer) -> Self {
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

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where it listens, as `OTEL_EXPORTER_OTLP_ENDPOINT` says it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Takes spans over TLS as well, as the host that `identity` is of; returns the port.
    ///
    /// # Panics
    ///
    /// When there is no port.
    #[must_use]
    pub fn offer_tls(&self, identity: &Identity) -> u16 {
        let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).expect("a key");
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
        let config = Arc::new(config.expect("they belong together"));
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let requests = Arc::clone(&self.requests);
        // It ends with this program.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let connection = ServerConnection::new(Arc::clone(&config)).expect("a connection");
                let mut stream = StreamOwned::new(connection, stream.expect("somebody"));
                let (mut bytes, mut some) = (Vec::new(), [0; 4096]);
                while let Ok(count @ 1..) = stream.read(&mut some) {
                    bytes.extend_from_slice(&some[..count]);
                    while let Some(request) = next(&mut bytes) {
                        requests.lock().expect("nobody panics with it").push(request);
                        let _ = stream.write_all(TAKEN.as_bytes());
                    }
                }
            }
        });
        port
    }

    /// Everything that it was sent.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("nobody panics with it").clone()
    }

    /// Whether these bytes were sent anywhere.
    #[must_use]
    pub fn was_sent(&self, text: &str) -> bool {
        let holds = |bytes: &[u8]| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        self.requests().iter().any(|request| holds(request.head.as_bytes()) || holds(&request.body))
    }

    /// All spans so far.
    ///
    /// # Panics
    ///
    /// When it was sent something else.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = Vec::new();
        for request in self.requests() {
            let request = ExportTraceServiceRequest::decode(&*request.body).expect("an export of traces");
            for of_resource in request.resource_spans {
                let sender = attributes(of_resource.resource.map(|resource| resource.attributes).unwrap_or_default());
                let sent = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
                spans.extend(sent.map(|span| decoded(span, sender.clone())));
            }
        }
        spans
    }

    /// Waits until there are `count` spans with this value of an attribute, and returns them.
    ///
    /// # Panics
    ///
    /// When there are others, or they do not come.
    pub async fn with(&self, attribute: &str, value: &str, count: usize) -> Vec<Span> {
        eventually(&format!("{count} spans whose {attribute} is {value}"), async || {
            let mut spans = self.spans();
            spans.retain(|span| span.attributes.get(attribute).is_some_and(|is| is == value));
            assert!(spans.len() <= count, "more than {count}: {spans:#?}");
            (spans.len() == count).then_some(spans)
        })
        .await
    }

    /// Waits for the one span with this value of an attribute.
    ///
    /// # Panics
    ///
    /// As [`Collector::with`].
    pub async fn one(&self, attribute: &str, value: &str) -> Span {
        self.with(attribute, value, 1).await.remove(0)
    }
}

/// Takes requests until somebody hangs up.
async fn serve(mut stream: TcpStream, answer: Answer, requests: Arc<Mutex<Vec<Request>>>) {
    let mut bytes = Vec::new();
    while stream.read_buf(&mut bytes).await.is_ok_and(|count| count > 0) {
        while let Some(request) = next(&mut bytes) {
            requests.lock().expect("nobody panics with it").push(request);
            let text = match answer {
                Answer::Takes => TAKEN,
                Answer::Says(text) => text,
                Answer::Never => std::future::pending().await,
            };
            // Whoever was stopped meanwhile does not listen any more.
            if stream.write_all(text.as_bytes()).await.is_err() || matches!(answer, Answer::Says(_)) {
                return;
            }
        }
    }
}

/// Takes the first request from `bytes`, if it is there to its end.
fn next(bytes: &mut Vec<u8>) -> Option<Request> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = String::from_utf8(bytes[..head].to_vec()).expect("a head of ASCII");
    let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with("content-length:")).expect("a length");
    let length: usize = line["content-length:".len()..].trim().parse().expect("a number");
    let body = bytes.get(head..head + length)?.to_vec();
    bytes.drain(..head + length);
    Some(Request { head: text, body })
}

fn decoded(span: Sent, sender: BTreeMap<String, String>) -> Span {
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
        lasted: (span.start_time_unix_nano, span.end_time_unix_nano),
        error: status.map(|status| status.message),
        sender,
    }
}

/// No attribute twice.
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
