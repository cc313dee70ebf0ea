//! Somebody who collects traces over OTLP/HTTP, or does not: keeps what it was sent, as it came and decoded.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span as Sent, span::SpanKind};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::eventually;

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
    while let Some(request) = next(&mut stream, &mut bytes).await {
        requests.lock().expect("nobody panics with it").push(request);
        let taken = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";
        let text = match answer {
            Answer::Takes => taken,
            Answer::Says(text) => text,
            Answer::Never => std::future::pending().await,
        };
        // Whoever was stopped meanwhile does not listen any more.
        if stream.write_all(text.as_bytes()).await.is_err() || matches!(answer, Answer::Says(_)) {
            return;
        }
    }
}

/// The next request; `bytes` are those that were read beyond the last one.
async fn next(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Option<Request> {
    let (mut head, mut length) = (None, 0);
    loop {
        if head.is_none()
            && let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n")
        {
            let rest = bytes.split_off(end + 4);
            let text = String::from_utf8(std::mem::replace(bytes, rest)).expect("a head of ASCII");
            let said = text
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned));
            length = said.expect("a length").trim().parse().expect("a number");
            head = Some(text);
        }
        if head.is_some() && bytes.len() >= length {
            let rest = bytes.split_off(length);
            return Some(Request { head: head?, body: std::mem::replace(bytes, rest) });
        }
        if stream.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
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
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
