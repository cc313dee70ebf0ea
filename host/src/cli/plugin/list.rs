//! `tidings plugin list`: what serves in the running daemon, asked over HTTP.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use super::super::{printable, usage};
use crate::config::HttpArgs;

/// Whom to ask.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    http: HttpArgs,
    /// As JSON, as the daemon says it
    #[arg(long)]
    json: bool,
}

pub(super) fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let addr = match args.http.check() {
        Ok(addr) => addr,
        Err(mistakes) => return Ok(usage(&mistakes)),
    };
    let agent = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(30))).build().new_agent();
    let mut answer = agent
        .get(format!("http://{addr}/api/plugins"))
        .call()
        .with_context(|| format!("no daemon answers at {addr}; is it running, and is that its TIDINGS_HTTP_ADDR?"))?;
    let text = answer.body_mut().read_to_string().context("the answer broke off")?;
    if args.json {
        println!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    let answer: Value = serde_json::from_str(&text).context("the answer is not a daemon's")?;
    let plugins = answer["plugins"].as_array().map(Vec::as_slice).unwrap_or_default();
    if plugins.is_empty() {
        println!("no plugin");
    }
    for plugin in plugins {
        show(plugin);
    }
    for held in answer["held"].as_array().into_iter().flatten() {
        println!("held: {} rows of the kind {}, which no plugin serves", held["rows"], text_of(&held["kind"]));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(plugin: &Value) {
    let file = text_of(&plugin["file"]);
    let active = &plugin["active"];
    if active.is_null() {
        println!("{file}: does not serve");
    } else {
        println!("{file}: {}, generation {}", text_of(&active["plugin"]), active["generation"]);
        println!("  sha-256  {}", text_of(&active["digest"]));
        for kind in active["kinds"].as_array().into_iter().flatten() {
            println!(
                "  kind     {:<30} breaker {}, {} answered, {} failed",
                text_of(&kind["kind"]),
                text_of(&kind["breaker"]),
                kind["answered"],
                kind["failed"]
            );
        }
        let limits = &active["limits"];
        let kib = |bytes: &Value| bytes.as_u64().unwrap_or(0).div_ceil(1024);
        println!(
            "  at most  {} of {} KiB memory, {} of {} ms CPU, {} of {} KiB output",
            kib(&active["peak_memory_bytes"]),
            limits["memory-mib"].as_u64().unwrap_or(0) * 1024,
            active["peak_cpu_ms"],
            limits["cpu-ms"],
            kib(&active["peak_output_bytes"]),
            limits["output-kib"]
        );
    }
    if let Some(problem) = plugin["problem"].as_str() {
        println!("  REFUSED  {}", printable(problem));
    }
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
