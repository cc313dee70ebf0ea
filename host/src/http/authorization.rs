//! Who may read and who may act. A page of another origin may do neither. Acting needs the token. Everything else may
//! be read by anybody who reaches the address: kinds, keys and reasons, but never a payload.
//!
//! A daemon that listens on a loopback address answers only requests for `localhost` or an IP address. Otherwise a web
//! page could read it through a name that resolves to the loopback address (DNS rebinding). A daemon that listens on
//! other addresses cannot know its own names.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use tracing::warn;

use crate::http::AppState;
use crate::http::error::ErrorResponse;

/// How many characters of a header an error quotes.
const MAX_QUOTED: usize = 100;

/// Refuses a request from a page of another origin.
pub(super) async fn require_same_origin(State(app): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    match check_origin(request.headers(), app.addr.ip().is_loopback()) {
        Some(error) => error.into_response(),
        None => next.run(request).await,
    }
}

/// Refuses an action without the token.
pub(super) async fn require_token(State(app): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    // Other methods are not allowed on these paths. The answer that says so needs no token.
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let Some(token) = &app.sources.token else {
        let sentence = "this daemon is read-only: to act here, start it with TIDINGS_HTTP_TOKEN";
        return ErrorResponse::new(StatusCode::FORBIDDEN, sentence).into_response();
    };
    let given = request.headers().get(AUTHORIZATION).map(axum::http::HeaderValue::as_bytes);
    let given =
        given.and_then(|given| given.split_at_checked(7)).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let sentence = match given {
        Some((_, given)) if token.is(given) => return next.run(request).await,
        Some(_) => "the token is wrong: it is the TIDINGS_HTTP_TOKEN that this daemon was started with",
        None => "a token is needed: send the header Authorization: Bearer TIDINGS_HTTP_TOKEN",
    };
    // A browser that has no token yet is not worth a line of the log.
    if given.is_some() {
        let from = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.to_string());
        warn!(from, path = request.uri().path(), "somebody wanted to act with a wrong token");
    }
    ErrorResponse::new(StatusCode::UNAUTHORIZED, sentence).into_response()
}

/// Returns an error unless a request comes from the daemon's own page or from a program that is no browser.
fn check_origin(headers: &HeaderMap, is_loopback: bool) -> Option<ErrorResponse> {
    let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let forbidden = |sentence: String| Some(ErrorResponse::new(StatusCode::FORBIDDEN, sentence));
    let Some(host) = text(HOST.as_str()).filter(|host| !host.is_empty()) else {
        return Some(ErrorResponse::bad_request("the request has no header Host"));
    };
    if is_loopback && !is_local_name(&host) {
        let host: String = host.chars().take(MAX_QUOTED).collect();
        return forbidden(format!(
            "this daemon listens only on a loopback address and does not answer requests for {host:?}: use localhost or the address; a proxy on this machine must send Host: localhost, and the name in X-Forwarded-Host"
        ));
    }
    if let Some(fetch_site) = text("sec-fetch-site").filter(|site| !["same-origin", "none"].contains(&site.as_str())) {
        let fetch_site: String = fetch_site.chars().take(MAX_QUOTED).collect();
        return forbidden(format!(
            "a browser may send requests only from the daemon's own page; this one comes from another origin ({fetch_site})"
        ));
    }
    let origin = text(ORIGIN.as_str())?;
    // A page of another origin cannot send X-Forwarded-Host: its browser asks for permission first, and the daemon
    // grants none.
    let forwarded = text("x-forwarded-host");
    if [Some(host), forwarded].into_iter().flatten().any(|host| is_origin_of(&origin, &host)) {
        return None;
    }
    let origin: String = origin.chars().take(MAX_QUOTED).collect();
    forbidden(format!(
        "a browser may send requests only from the daemon's own page; this one comes from {origin:?}. A proxy in between must pass the header Host on unchanged"
    ))
}

/// Whether a host can only be this machine: `localhost`, a name below it, or an IP address.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.to_ascii_lowercase();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
    name == "localhost" || name.ends_with(".localhost") || address.parse::<IpAddr>().is_ok()
}

/// Whether the page at `origin` came from `host`: the same name and port, where the scheme's default port may be left
/// out. The scheme is not compared, since a proxy may end TLS in between.
fn is_origin_of(origin: &str, host: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let bare = |text: &str| {
        let text = text.to_ascii_lowercase();
        text.strip_suffix(port).map_or(text.clone(), str::to_owned)
    };
    !authority.is_empty() && bare(authority) == bare(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(is_loopback: bool, headers: &[(&'static str, &str)]) -> Option<u16> {
        let headers = headers
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), value.parse().expect("a header")));
        check_origin(&headers.collect(), is_loopback).map(|error| error.status.as_u16())
    }

    #[test]
    fn requests_of_the_own_page_and_of_programs_are_accepted_and_those_of_other_pages_are_not() {
        for (headers, expected) in [
            (&[("host", "h:7070")][..], None),
            (&[("host", "h:7070"), ("origin", "http://h:7070"), ("sec-fetch-site", "same-origin")], None),
            (&[("host", "h:7070"), ("sec-fetch-site", "none")], None),
            (&[("host", "H"), ("origin", "https://h")], None),
            (&[("host", "h"), ("origin", "https://h:443")], None),
            (&[("host", "h:443"), ("origin", "https://h")], None),
            (&[("host", "h:80"), ("origin", "http://h")], None),
            (&[("host", "[::1]:7070"), ("origin", "http://[::1]:7070")], None),
            (&[("host", "localhost"), ("x-forwarded-host", "h.example"), ("origin", "https://h.example")], None),
            (&[("origin", "http://h")], Some(400)),
            (&[("host", ""), ("origin", "http://")], Some(400)),
            (&[("host", "h:7070"), ("origin", "http://h:7071")], Some(403)),
            (&[("host", "h"), ("origin", "https://h:80")], Some(403)),
            (&[("host", "h"), ("origin", "http://h:443")], Some(403)),
            (&[("host", "h"), ("origin", "http://evil")], Some(403)),
            (&[("host", "h"), ("origin", "http://h.evil")], Some(403)),
            (&[("host", "h"), ("origin", "null")], Some(403)),
            (&[("host", "h"), ("origin", "")], Some(403)),
            (&[("host", "h"), ("origin", "file://h")], Some(403)),
            (&[("host", "h"), ("sec-fetch-site", "cross-site")], Some(403)),
            (&[("host", "h"), ("sec-fetch-site", "same-site"), ("origin", "http://h")], Some(403)),
        ] {
            assert_eq!(verdict(false, headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn a_daemon_on_a_loopback_address_answers_only_requests_for_local_names() {
        for (host, expected) in [
            ("127.0.0.1:7070", None),
            ("127.0.0.1", None),
            ("[::1]:7070", None),
            ("[::1]", None),
            ("localhost", None),
            ("LocalHost:1", None),
            ("tidings.localhost:7070", None),
            ("evil.example:7070", Some(403)),
            ("localhost.evil.example", Some(403)),
            ("127.0.0.1.evil.example:7070", Some(403)),
        ] {
            assert_eq!(verdict(true, &[("host", host)]), expected, "{host}");
            assert_eq!(verdict(false, &[("host", host)]), None, "{host}");
        }
    }
}
