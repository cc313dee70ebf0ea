//! Variables that begin with `TIDINGS_` and are no settings: those of users, and those that Kubernetes and Docker set.

use harness::world::World;

#[tokio::test]
async fn variables_that_kubernetes_sets_for_a_service_named_tidings_are_ignored_with_one_line_in_the_log() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world
        .launch()
        .with("TIDINGS_SERVICE_HOST", "10.0.0.11")
        .with("TIDINGS_SERVICE_PORT", "7070")
        .with("TIDINGS_SERVICE_PORT_HTTP", "7070")
        .with("TIDINGS_PORT", "tcp://10.0.0.11:7070")
        .with("TIDINGS_PORT_7070_TCP", "tcp://10.0.0.11:7070")
        .with("TIDINGS_PORT_7070_TCP_ADDR", "10.0.0.11")
        .with("TIDINGS_X_IMAGE", "tidings:1")
        .start_ready()
        .await;
    let line = daemon.wait_for_line("ignored variables").await;
    assert!(line.contains("TIDINGS_PORT_7070_TCP_ADDR") && line.contains("TIDINGS_SERVICE_PORT_HTTP"), "{line}");
    assert!(!line.contains("TIDINGS_X_IMAGE"), "{line}");
    assert_eq!(daemon.log().matches("ignored variables").count(), 1);
}

#[tokio::test]
async fn a_variable_of_a_users_own_is_refused_with_the_name_that_it_may_have() {
    let world = World::with_plugins(&["message"]).await;
    for (name, value, allowed) in [
        ("TIDINGS_IMAGE", "tidings:1", "TIDINGS_X_IMAGE"),
        ("TIDINGS_VERSION", "1.2", "TIDINGS_X_VERSION"),
        ("TIDINGS_PORT", "7070", "TIDINGS_X_PORT"),
    ] {
        let (code, output) = world.launch().with(name, value).run_to_end().await;
        assert_eq!(code, 64, "{output}");
        assert!(output.contains(&format!("{name} is not a setting")) && output.contains(allowed), "{output}");
    }
}
