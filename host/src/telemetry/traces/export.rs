//! Sends the spans: through a bounded queue to the library's own thread, and from there over HTTP. A span that finds
//! the queue full, or that the collector does not take, is lost and counted. The log has one line when the collector
//! stops taking spans, and one when it takes them again.

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

use crate::model::secrets::SecretUrl;
use crate::telemetry::count_dropped_spans;
use crate::telemetry::traces::TraceSettings;

/// The longest answer of a collector that is accepted. Answers are short.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Checks the URL of a collector.
///
/// # Errors
///
/// When the URL cannot be used. The error contains no secret.
pub fn check_endpoint(url: &SecretUrl) -> Result<(), String> {
    host_and_port(url).map(drop)
}

/// Host and port, as they were given.
fn host_and_port(url: &SecretUrl) -> Result<String, String> {
    let uri: Uri = url.expose().parse().map_err(|error| format!("{error}"))?;
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    let authority = authority.ok_or("it names no host")?;
    if authority.as_str().contains('@') {
        return Err("it has a user in it; set the collector's credentials in OTEL_EXPORTER_OTLP_HEADERS".into());
    }
    if authority.as_str().len() > authority.host().len() && authority.port_u16().is_none() {
        return Err("its port is not a number up to 65535".into());
    }
    Ok(authority.to_string())
}

/// Returns the queue to the collector, and the collector's host and port.
pub(super) fn start(settings: &TraceSettings) -> Result<(Queue, String), ExporterBuildError> {
    let TraceSettings { endpoint, timeout, queue: capacity } = settings;
    let place = host_and_port(endpoint).map_err(ExporterBuildError::InvalidConfiguration)?;
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Collector::new(endpoint, place.clone(), *timeout))
        .with_endpoint(endpoint.expose())
        .with_timeout(*timeout)
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .build()?;
    let waiting = Arc::new(AtomicUsize::new(0));
    let exporter = CountingExporter { exporter, waiting: Arc::clone(&waiting) };
    let config = BatchConfigBuilder::default().with_max_queue_size(*capacity).build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    Ok((Queue { processor, waiting, capacity: *capacity }, place))
}

/// The library's queue does not tell how many spans it drops. This one drops and counts them before they get there.
#[derive(Debug)]
pub(super) struct Queue {
    processor: BatchSpanProcessor,
    waiting: Arc<AtomicUsize>,
    capacity: usize,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.waiting.fetch_add(1, Ordering::AcqRel) < self.capacity {
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

/// The library's exporter, with a count of the spans that it takes from the queue and of those that are lost.
#[derive(Debug)]
struct CountingExporter {
    exporter: SpanExporter,
    waiting: Arc<AtomicUsize>,
}

impl Export for CountingExporter {
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

/// An HTTP client for the collector. It trusts the certificates that this machine trusts.
struct Collector {
    agent: Mutex<ureq::Agent>,
    place: String,
    secure: bool,
    timeout: Duration,
    /// Whether the collector did not take the last spans.
    is_failing: AtomicBool,
}

impl Collector {
    fn new(endpoint: &SecretUrl, place: String, timeout: Duration) -> Self {
        let secure = endpoint.expose().starts_with("https:");
        Self {
            agent: Mutex::new(build_agent(secure, timeout)),
            place,
            secure,
            timeout,
            is_failing: AtomicBool::new(false),
        }
    }

    /// The HTTP client. After a failure it is made anew, since the machine's trusted certificates may have changed.
    fn agent(&self) -> ureq::Agent {
        let mut agent = self.agent.lock().expect("the lock is not poisoned");
        if self.secure && self.is_failing.load(Ordering::Relaxed) {
            *agent = build_agent(self.secure, self.timeout);
        }
        agent.clone()
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (parts, body) = request.into_parts();
        let (parts, mut body) = self.agent().run(Request::from_parts(parts, &body[..]))?.into_parts();
        let body = body.with_config().limit(MAX_ANSWER_BYTES).read_to_vec()?;
        Ok(Response::from_parts(parts, body.into()))
    }

    /// Logs when the collector stops taking spans, and when it takes them again.
    fn log_change(&self, answer: &Result<Response<Bytes>, ureq::Error>) {
        let place = &self.place;
        let error: Option<&dyn std::error::Error> = match answer {
            Ok(answer) if answer.status().is_success() => {
                if self.is_failing.swap(false, Ordering::Relaxed) {
                    info!(place, "the collector at {place} takes spans again");
                }
                return;
            }
            Ok(_) => None,
            Err(error) => Some(error),
        };
        if self.is_failing.swap(true, Ordering::Relaxed) {
            return;
        }
        let status = answer.as_ref().ok().map(|answer| answer.status().as_u16());
        warn!(
            place,
            status, error, "the collector at {place} does not take spans; they are lost, and everything else goes on"
        );
    }
}

fn build_agent(secure: bool, timeout: Duration) -> ureq::Agent {
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
        // Sending blocks, which is harmless on the library's own thread; its timeout ends it.
        Box::pin(async move {
            let answer = self.send(request);
            self.log_change(&answer);
            Ok(answer?)
        })
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Collector({})", self.place)
    }
}
