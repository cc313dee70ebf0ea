//! The page: files that are compiled into the binary, and the headers that keep a browser from loading anything else,
//! sending anything elsewhere, or showing the page in a frame.

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use axum::response::Response;
use axum::routing::get;

/// The path, the content type and the text of each file.
const FILES: [(&str, &str, &str); 11] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page/page.css")),
    ("/act.js", SCRIPT, include_str!("page/act.js")),
    ("/explain.js", SCRIPT, include_str!("page/explain.js")),
    ("/intakes.js", SCRIPT, include_str!("page/intakes.js")),
    ("/letters.js", SCRIPT, include_str!("page/letters.js")),
    ("/page.js", SCRIPT, include_str!("page/page.js")),
    ("/plots.js", SCRIPT, include_str!("page/plots.js")),
    ("/recurrences.js", SCRIPT, include_str!("page/recurrences.js")),
    ("/table.js", SCRIPT, include_str!("page/table.js")),
    ("/words.js", SCRIPT, include_str!("page/words.js")),
];
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Allows these files, requests to the daemon, and images in `data:` URLs, and nothing else. No text ever becomes HTML.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      form-action 'none'; base-uri 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

const HEADERS: [(HeaderName, &str); 6] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
];

/// The routes of the files.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.into_iter().fold(Router::new(), |router, (path, content_type, text)| {
        router.route(path, get(move || async move { ([(CONTENT_TYPE, content_type)], text) }))
    })
}

/// Adds the headers of every answer. Browsers must not cache, since another release has other files.
pub(super) async fn add_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
