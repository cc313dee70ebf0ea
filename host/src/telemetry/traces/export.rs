//! How spans leave: through a bounded queue to the library's own thread, and from there over HTTP. What finds no place, and
//! what the collector does not take, is lost and counted. That a collector is away is told once, and that it is back.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter as Export, SpanProcessor,
};
use tracing::{info, warn};
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::model::secret_url::SecretUrl;
use crate::telemetry::count_dropped_spans;
use crate::telemetry::traces::TraceSettings;

/// An answer says next to nothing. A longer one is none.
const ANSWER_BYTES: u64 = 64 * 1024;

/// Understands where a collector is.
///
/// # Errors
///
/// When it cannot, without anything secret in the answer.
pub fn check_endpoint(url: &SecretUrl) -> Result<(), String> {
    place(url).map(drop)
}

/// Host and port, as they were given.
fn place(url: &SecretUrl) -> Result<String, String> {
    let uri: Uri = url.expose().parse().map_err(|error| format!("{error}"))?;
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    let authority = authority.ok_or("it names no host")?;
    if authority.as_str().contains('@') {
        return Err("it has a user in it; what the collector asks for goes into OTEL_EXPORTER_OTLP_HEADERS".into());
    }
    if authority.as_str().len() > authority.host().len() && authority.port_u16().is_none() {
        return Err("its port is no number up to 65535".into());
    }
    Ok(authority.to_string())
}

/// The queue to the collector, and the collector's place.
pub(super) fn start(settings: &TraceSettings) -> Result<(Queue, String), ExporterBuildError> {
    let TraceSettings { endpoint, timeout, queue: room } = settings;
    let place = place(endpoint).map_err(ExporterBuildError::InvalidConfiguration)?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Collector::new(endpoint, place.clone(), *timeout))
        .with_endpoint(endpoint.expose())
        .with_timeout(*timeout)
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .build()?;
    let waiting = Arc::new(AtomicUsize::new(0));
    let counted = Counted { exporter, waiting: Arc::clone(&waiting) };
    let config = BatchConfigBuilder::default().with_max_queue_size(*room).build();
    let processor = BatchSpanProcessor::builder(counted).with_batch_config(config).build();
    Ok((Queue { processor, waiting, room: *room }, place))
}

/// The library's queue, which never says how many it drops; so none gets there that would be.
#[derive(Debug)]
pub(super) struct Queue {
    processor: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
    room: usize,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::AcqRel) < self.room {
            self.processor.on_end(span);
        } else {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            count_dropped_spans(1);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

/// The library's exporter, at the other end of its queue.
#[derive(Debug)]
struct Counted {
    exporter: SpanExporter,
    waiting: Arc<AtomicUsize>,
}

impl Export for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.waiting.fetch_sub(spans, Ordering::AcqRel);
        let exported = self.exporter.export(batch).await;
        if exported.is_err() {
            count_dropped_spans(spans as u64);
        }
        exported
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The collector, over the HTTP client and with the trust that the rest of the house has.
struct Collector {
    agent: Mutex<ureq::Agent>,
    place: String,
    secure: bool,
    timeout: Duration,
    /// It did not take what it was sent last.
    fails: AtomicBool,
}

impl Collector {
    fn new(endpoint: &SecretUrl, place: String, timeout: Duration) -> Self {
        let secure = endpoint.expose().starts_with("https:");
        Self { agent: Mutex::new(agent(secure, timeout)), place, secure, timeout, fails: AtomicBool::new(false) }
    }

    /// With what this machine trusts: after a failure asked anew, since its files may have changed.
    fn agent(&self) -> ureq::Agent {
        let mut kept = self.agent.lock().expect("nobody panics with it");
        if self.secure && self.fails.load(Ordering::Relaxed) {
            *kept = agent(self.secure, self.timeout);
        }
        kept.clone()
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (parts, body) = request.into_parts();
        let (parts, mut body) = self.agent().run(Request::from_parts(parts, &body[..]))?.into_parts();
        let body = body.with_config().limit(ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }

    /// Says what is new.
    fn note(&self, answer: &Result<Response<Bytes>, ureq::Error>) {
        let place = &self.place;
        let error: Option<&dyn std::error::Error> = match answer {
            Ok(answer) if answer.status().is_success() => {
                if self.fails.swap(false, Ordering::Relaxed) {
                    info!(place, "the collector at {place} takes spans again");
                }
                return;
            }
            Ok(_) => None,
            Err(error) => Some(error),
        };
        if self.fails.swap(true, Ordering::Relaxed) {
            return;
        }
        let status = answer.as_ref().ok().map(|answer| answer.status().as_u16());
        warn!(
            place,
            status, error, "the collector at {place} does not take spans; they are lost, and everything else goes on"
        );
    }
}

fn agent(secure: bool, timeout: Duration) -> ureq::Agent {
    let mut config = ureq::Agent::config_builder().timeout_global(Some(timeout)).http_status_as_error(false);
    if secure {
        let roots = rustls_native_certs::load_native_certs().certs;
        let roots = roots.iter().map(|root| Certificate::from_der(root).to_owned());
        config = config.tls_config(TlsConfig::builder().root_certs(RootCerts::from(roots)).build());
    }
    config.build().new_agent()
}

impl HttpClient for Collector {
    fn send_bytes<'this, 'sent>(
        &'this self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sent>>
    where
        'this: 'sent,
        Self: 'sent,
    {
        // It blocks, as it may on a thread that does nothing else; its deadline ends it.
        Box::pin(async move {
            let answer = self.send(request);
            self.note(&answer);
            Ok(answer?)
        })
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Collector({})", self.place)
    }
}
