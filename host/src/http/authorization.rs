//! Who may ask and who may act. Nobody may through a page of another origin; whoever acts needs the token. What is shown,
//! anybody may read who reaches the address: kinds, keys, reasons, and never a payload.
//!
//! A daemon that listens for its own machine alone answers only to the machine's own names, so that no page of the world
//! reads it through a name that it points there (DNS rebinding). One that listens for others cannot know its names.

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

/// As much of a header is repeated to whoever sent it, in characters.
const REPEATED: usize = 100;

/// Lets through what does not come from a page of another origin.
pub(super) async fn own_page(State(site): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    match stranger(request.headers(), site.addr.ip().is_loopback()) {
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    }
}

/// Lets through what has the token.
pub(super) async fn with_token(State(site): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    // What is not done here at all, needs no token to be told so.
    if request.method() != Method::POST {
        return next.run(request).await;
    }
    let Some(token) = &site.shown.token else {
        let sentence = "this daemon only shows: to act here, start it with TIDINGS_HTTP_TOKEN";
        return ErrorResponse::new(StatusCode::FORBIDDEN, sentence).into_response();
    };
    let given = request.headers().get(AUTHORIZATION).map(axum::http::HeaderValue::as_bytes);
    let given =
        given.and_then(|given| given.split_at_checked(7)).filter(|(how, _)| how.eq_ignore_ascii_case(b"bearer "));
    let sentence = match given {
        Some((_, given)) if token.is(given) => return next.run(request).await,
        Some(_) => "the token is wrong: it is the TIDINGS_HTTP_TOKEN that this daemon was started with",
        None => "a token is needed: send the header Authorization: Bearer TIDINGS_HTTP_TOKEN",
    };
    // A browser that was not given the token yet is nothing to write about.
    if given.is_some() {
        let from = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.to_string());
        warn!(from, path = request.uri().path(), "somebody wanted to act with a wrong token");
    }
    ErrorResponse::new(StatusCode::UNAUTHORIZED, sentence).into_response()
}

/// Why a request is not one of our own page or of a program; `None` = it is.
fn stranger(headers: &HeaderMap, only_here: bool) -> Option<ErrorResponse> {
    let text = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let forbidden = |sentence: String| Some(ErrorResponse::new(StatusCode::FORBIDDEN, sentence));
    let Some(host) = text(HOST.as_str()).filter(|host| !host.is_empty()) else {
        return Some(ErrorResponse::bad("the request does not say for which host it is"));
    };
    if only_here && !is_here(&host) {
        let host: String = host.chars().take(REPEATED).collect();
        return forbidden(format!(
            "this daemon listens for its own machine alone, and does not answer as {host:?}: ask as localhost or by its address; a proxy on this machine sends Host: localhost, and the name in X-Forwarded-Host"
        ));
    }
    if let Some(site) = text("sec-fetch-site").filter(|site| !["same-origin", "none"].contains(&site.as_str())) {
        let site: String = site.chars().take(REPEATED).collect();
        return forbidden(format!("only the daemon's own page may ask, and this is a request from another ({site})"));
    }
    let origin = text(ORIGIN.as_str())?;
    // A page of another origin cannot send this header without asking first, which nobody answers.
    let forwarded = text("x-forwarded-host");
    if [Some(host), forwarded].into_iter().flatten().any(|host| is_origin_of(&origin, &host)) {
        return None;
    }
    let origin: String = origin.chars().take(REPEATED).collect();
    forbidden(format!(
        "only the daemon's own page may ask, and this is a request from {origin:?}; a proxy in between must pass the header Host on as it came"
    ))
}

/// Whether nobody but this machine can be meant.
fn is_here(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.to_ascii_lowercase();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
    name == "localhost" || name.ends_with(".localhost") || address.parse::<IpAddr>().is_ok()
}

/// Whether the page at `origin` came from `host`: the same name and port, where the scheme's own port may be left out. The
/// scheme is not compared: who ends TLS may stand in between.
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

    fn verdict(only_here: bool, headers: &[(&'static str, &str)]) -> Option<u16> {
        let headers = headers
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), value.parse().expect("a header")));
        stranger(&headers.collect(), only_here).map(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn our_own_page_and_programs_may_ask_and_pages_of_others_may_not() {
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
    fn a_daemon_that_listens_for_its_own_machine_answers_to_its_own_names() {
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
