//! Checks the names in the documentation: linked files and headings, settings, metrics, alerts, commands and flags
//! exist, and the documentation mentions all of them.

use std::collections::BTreeSet;
use std::path::Path;

use harness::pages::Page;
use harness::repository;
use harness::world::World;

use crate::documentation::docs::{PAGES, fail_on_mistakes, pages};

/// Flags in the text that belong to other programs: `cargo rig` and componentize-py.
const FLAGS_OF_OTHER_PROGRAMS: [&str; 5] = ["--seed", "--daemons", "--rate", "--only", "--stub-wasi"];

/// Names in the text that begin like a setting but are none: the common prefix, prefixes that the daemon ignores, and
/// variables of Kubernetes.
const NAMES_OF_NO_SETTING: [&str; 4] = ["TIDINGS_", "TIDINGS_X_", "TIDINGS_SERVICE_HOST", "TIDINGS_PORT_"];

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let mut mistakes = Vec::new();
    for page in pages() {
        for (line, link) in page.links().into_iter().filter(|(_, link)| !link.starts_with("https://")) {
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let there = repository().join(page.path).parent().expect("a directory").join(file);
            let to = if file.is_empty() { repository().join(page.path) } else { there };
            if !to.exists() {
                mistakes.push(format!("{}:{line}: there is no {link}", page.path));
            } else if let Some(anchor) = anchor {
                let to = pages().into_iter().find(|page| is_same_file(&repository().join(page.path), &to));
                if !to.is_some_and(|to| to.anchors().iter().any(|other| other == anchor)) {
                    mistakes.push(format!("{}:{line}: there is no heading {link}", page.path));
                }
            }
        }
    }
    fail_on_mistakes(&mistakes);
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    one.canonicalize().ok() == other.canonicalize().ok()
}

/// The words of `text` that begin with `begin` and continue with characters for which `goes_on` is true.
fn find_words<'a>(text: &'a str, begin: &str, goes_on: impl Fn(char) -> bool) -> BTreeSet<&'a str> {
    let starts =
        text.match_indices(begin).filter(|(at, _)| !text[..*at].ends_with(|char: char| char.is_alphanumeric()));
    starts.map(|(at, _)| &text[at..][..text[at..].find(|char| !goes_on(char)).unwrap_or(text.len() - at)]).collect()
}

#[tokio::test]
async fn every_variable_on_a_page_is_a_setting_and_every_setting_is_in_the_reference() {
    let world = World::empty().await;
    let (_, output) = world.launch().with("TIDINGS_NONSENSE", 1).run_to_end().await;
    let settings = output.split("there are ").nth(1).and_then(|rest| rest.split(". ").next()).expect("a list");
    let settings: BTreeSet<&str> = settings.split(", ").collect();
    assert!(settings.len() > 15, "{settings:?}");
    let mut mistakes = Vec::new();
    for page in PAGES.map(Page::read) {
        let named = find_words(page.text(), "TIDINGS_", |char| char.is_ascii_uppercase() || char == '_');
        mistakes.extend(
            named
                .difference(&settings)
                .filter(|name| !NAMES_OF_NO_SETTING.contains(name))
                .map(|name| format!("{}: {name}", page.path)),
        );
    }
    let reference = Page::read("host/docs/reference.md");
    mistakes.extend(
        settings
            .iter()
            .filter(|name| !reference.text().contains(**name))
            .map(|name| format!("not in the reference: {name}")),
    );
    fail_on_mistakes(&mistakes);
}

#[tokio::test]
async fn every_metric_on_a_page_exists_with_its_labels_and_operations_lists_all_metrics() {
    let world = World::with_plugins(&["message"]).await;
    // The metrics of an intake exist if there is one.
    let mut daemon = crate::intake::start(&world).await;
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    let asked = tokio::task::spawn_blocking(move || {
        ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text")
    });
    let scraped = asked.await.expect("asked");
    let metrics: BTreeSet<&str> =
        scraped.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    assert!(metrics.len() > 30, "{scraped}");
    let mut mistakes = Vec::new();
    for page in PAGES.map(Page::read) {
        for (line, code) in page.code().into_iter().filter(|(_, code)| code.starts_with("tidings_")) {
            let (name, labels) = code.split_once('{').unwrap_or((code, "}"));
            let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
            let named = |label: &str| {
                scraped.lines().any(|series| series.starts_with(name) && series.contains(&format!("{label}=\"")))
            };
            // Roles, and the metrics of the process, have the same prefix.
            let other = ["tidings_producer", "tidings_daemon", "tidings_service", "tidings_process_…"].contains(&code);
            if !other && !metrics.contains(name) || !labels.clone().all(named) {
                mistakes.push(format!("{}:{line}: there is no metric {code}", page.path));
            }
        }
    }
    let operations = Page::read("host/docs/operations.md");
    let absent =
        metrics.iter().filter(|name| !name.starts_with("tidings_process_") && !operations.text().contains(**name));
    mistakes.extend(absent.map(|name| format!("not in host/docs/operations.md: {name}")));
    let alerts = std::fs::read_to_string(repository().join("host/deploy/alerts.yml")).expect("alerts");
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        if !operations.text().contains(&format!("`{alert}`")) {
            mistakes.push(format!("not in host/docs/operations.md: {alert}"));
        }
    }
    fail_on_mistakes(&mistakes);
}

/// The subcommands of a command, and the text of its help.
async fn read_help(world: &World, command: &[&str]) -> (Vec<String>, String) {
    let (code, help) = world.tidings([command, &["--help"]].concat()).await;
    assert_eq!(code, 0, "{command:?}: {help}");
    let listed = help.split("Commands:\n").nth(1).unwrap_or_default().lines();
    let names =
        listed.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    (names.filter(|name| !name.is_empty() && *name != "help").map(str::to_owned).collect(), help.clone())
}

#[tokio::test]
async fn every_command_on_a_page_exists_with_its_flags_and_the_reference_lists_all_commands() {
    let world = World::empty().await;
    let reference = Page::read("host/docs/reference.md");
    let (mut known, mut mistakes) = (Vec::new(), Vec::new());
    for name in read_help(&world, &[]).await.0 {
        let (inner, text) = read_help(&world, &[&name]).await;
        for inner in &inner {
            let text = read_help(&world, &[&name, inner]).await.1;
            let listed = reference
                .code()
                .iter()
                .any(|(_, code)| *code == inner || code.starts_with(&format!("tidings {name} {inner}")));
            if !listed {
                mistakes.push(format!("not in the reference: tidings {name} {inner}"));
            }
            known.push((format!("tidings {name} {inner}"), text));
        }
        if !reference.code().iter().any(|(_, code)| code.starts_with(&format!("tidings {name}"))) {
            mistakes.push(format!("not in the reference: tidings {name}"));
        }
        known.push((format!("tidings {name}"), text));
    }
    let flags: String = known.iter().map(|(_, text)| text.as_str()).collect();
    for page in PAGES.map(Page::read) {
        for (line, code) in page.code() {
            let place = format!("{}:{line}", page.path);
            let words = find_words(code, "--", |char| char.is_ascii_lowercase() || char == '-');
            if code.starts_with("tidings ") {
                let command = known.iter().filter(|(name, _)| code == name || code.starts_with(&format!("{name} ")));
                let Some((name, help)) = command.max_by_key(|(name, _)| name.len()) else {
                    mistakes.push(format!("{place}: there is no command {code}"));
                    continue;
                };
                let odd = words
                    .iter()
                    .filter(|flag| !help.contains(&format!("{flag} ")) && !help.contains(&format!("{flag}\n")));
                mistakes.extend(odd.map(|flag| format!("{place}: {name} has no flag {flag}")));
            } else if code.starts_with("--") && !FLAGS_OF_OTHER_PROGRAMS.contains(words.first().unwrap_or(&"")) {
                let odd = words.iter().filter(|flag| !flags.contains(**flag));
                mistakes.extend(odd.map(|flag| format!("{place}: no command has the flag {flag}")));
            }
        }
    }
    fail_on_mistakes(&mistakes);
}
