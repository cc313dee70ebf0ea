//! `tidings plugin list`: what serves in the running daemon, asked over HTTP.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use crate::cli::output::{Output, print};
use crate::cli::{fail_usage, pause_sentence, printable};
use crate::config::HttpArgs;
use crate::model::row_status::Pause;

/// The daemon to ask.
#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    http: HttpArgs,
}

pub(super) fn list(args: ListArgs, output: Output) -> anyhow::Result<ExitCode> {
    let addr = match args.http.check() {
        Ok(addr) => addr,
        Err(errors) => return Ok(fail_usage(&errors)),
    };
    let agent = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(30))).build().new_agent();
    let mut answer = agent
        .get(format!("http://{addr}/api/plugins"))
        .call()
        .with_context(|| format!("no daemon answers at {addr}; is it running, and is that its TIDINGS_HTTP_ADDR?"))?;
    let text = answer.body_mut().read_to_string().context("the answer broke off")?;
    let answer: Value = serde_json::from_str(&text).context("the answer is not a daemon's")?;
    // The daemon's JSON, unchanged.
    output.json(&answer);
    if output == Output::Text {
        show_all(&answer);
    }
    Ok(ExitCode::SUCCESS)
}

fn show_all(answer: &Value) {
    let plugins = answer["plugins"].as_array().map(Vec::as_slice).unwrap_or_default();
    if plugins.is_empty() {
        print("no plugin");
    }
    for plugin in plugins {
        show(plugin);
    }
    for held in answer["held"].as_array().into_iter().flatten() {
        print(format_args!(
            "held: {} rows of the kind {}, which no plugin serves",
            held["rows"],
            text_of(&held["kind"])
        ));
    }
    for pause in answer["paused"].as_array().into_iter().flatten() {
        let pause: Result<Pause, _> = serde_json::from_value(pause.clone());
        if let Ok(pause) = pause {
            print(format_args!("paused: {}", pause_sentence(&pause)));
        }
    }
}

fn show(plugin: &Value) {
    let file = text_of(&plugin["file"]);
    let active = &plugin["active"];
    if active.is_null() {
        print(format_args!("{file}: does not serve"));
    } else {
        print(format_args!("{file}: {}, generation {}", text_of(&active["plugin"]), active["generation"]));
        print(format_args!("  sha-256  {}", text_of(&active["digest"])));
        for kind in active["kinds"].as_array().into_iter().flatten() {
            print(format_args!(
                "  kind     {:<30} breaker {}, {} answered, {} failed",
                text_of(&kind["kind"]),
                text_of(&kind["breaker"]),
                kind["answered"],
                kind["failed"]
            ));
        }
        let limits = &active["limits"];
        let kib = |bytes: &Value| bytes.as_u64().unwrap_or(0).div_ceil(1024);
        print(format_args!(
            "  at most  {} of {} KiB memory, {} of {} ms CPU, {} of {} KiB output",
            kib(&active["peak_memory_bytes"]),
            limits["memory_mib"].as_u64().unwrap_or(0) * 1024,
            active["peak_cpu_ms"],
            limits["cpu_ms"],
            kib(&active["peak_output_bytes"]),
            limits["output_kib"]
        ));
    }
    if let Some(problem) = plugin["problem"].as_str() {
        print(format_args!("  REFUSED  {}", printable(problem)));
    }
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}
