//! The contract with plugins, wit/plugin.wit: plugins built for a released version can be loaded, and the generated
//! bindings are up to date.

use harness::world::World;
use harness::{bindings, repository};
use wit_parser::Resolve;

/// The directory with the released contract and a plugin that was built for it. Neither may ever change.
const KEPT: &str = "tests/fixtures/kept/0.1.0";

/// Checks with the rules of wasm-tools whether one contract may replace another.
fn semver_check(old: &str, new: &str) -> Result<(), String> {
    // The new contract gets another version: the resolver treats two packages with the same name as one.
    let new = new.replacen("package tidings:plugin@0.1.0;", "package tidings:plugin@0.1.99;", 1);
    let mut resolve = Resolve::default();
    let mut world = |name: &str, text: &str| {
        let package = resolve.push_str(name, text).expect("it is WIT");
        resolve.select_world(&[package], Some("plugin")).expect("it has the world")
    };
    let (old, new) = (world("old.wit", old), world("new.wit", &new));
    wit_component::semver_check(resolve, old, new).map_err(|error| format!("{error:#}"))
}

#[test]
fn the_contract_is_compatible_with_the_released_one() {
    let kept = std::fs::read_to_string(repository().join(KEPT).join("plugin.wit")).expect("it is kept");
    let now = std::fs::read_to_string(repository().join("wit/plugin.wit")).expect("it is there");

    assert_eq!(semver_check(&kept, &now), Ok(()));

    // Changes that break plugins are found.
    for (from, to) in [
        ("attempt: u32,", "attempt: u64,"),
        ("skip(string),", ""),
        ("record retry {", "record retry { again: bool,"),
        ("build: func(row: schedule)", "make: func(row: schedule)"),
        ("log: func(level: level, message: string);", ""),
    ] {
        let broken = now.replacen(from, to, 1);
        assert_ne!(broken, now, "{from} is there");
        assert!(semver_check(&kept, &broken).is_err(), "{to:?} in place of {from:?} was taken");
    }
    // A function that plugins need not import may be added.
    let more = now.replacen("interface host {", "interface host { name: func() -> string;", 1);
    assert_eq!(semver_check(&kept, &more), Ok(()));
}

#[tokio::test]
async fn a_plugin_built_for_the_released_contract_serves() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("message.wasm", &std::fs::read(repository().join(KEPT).join("message.wasm")).expect("it is kept"));
    let _daemon = world.start_daemon().await;

    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "kept", "body": "as ever"}')"#).await;

    let received = inbox.next().await;
    assert_eq!((received.delivery.routing_key.as_str(), received.text()), ("kept", "as ever"));
}

#[test]
fn the_bindings_of_a_new_plugin_match_the_contract() {
    let file = repository().join("host/template/src/tidings.rs");
    let generated = bindings::generate();
    if std::env::var_os("UPDATE_BINDINGS").is_some() {
        std::fs::write(&file, &generated).expect("written");
    }
    let there = std::fs::read_to_string(&file).expect("it is there");
    assert!(
        there == generated,
        "host/template/src/tidings.rs is not of this wit/plugin.wit; run this test with UPDATE_BINDINGS=1"
    );
}
