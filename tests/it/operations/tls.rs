//! Both servers over TLS, with certificates of a private authority: with the authority everything works, and a server that
//! may be somebody else is refused with a sentence that says why and what to do.

use std::path::{Path, PathBuf};

use harness::authority::Authority;
use harness::daemon::Launch;
use harness::eventually;
use harness::servers::Servers;
use harness::world::World;

use crate::dead_letters::replay::{often, reject, send};

/// A world whose servers show certificates for `localhost`.
pub(crate) struct Trusting<'a> {
    pub(crate) world: &'a World,
    /// Where RabbitMQ speaks TLS.
    pub(crate) amqps_port: u16,
}

impl Trusting<'_> {
    /// `launch` over TLS to `host`, for somebody who trusts the authority in `authority`.
    pub(crate) fn over_tls(&self, launch: &Launch, host: &str, authority: &Path) -> Launch {
        let Self { world, amqps_port } = self;
        let (postgres_port, _) = world.ports();
        let database_url = format!("postgres://postgres@{host}:{postgres_port}/{}?sslmode=verify-full", world.name);
        let amqp_url = format!("amqps://guest:guest@{host}:{amqps_port}/{}", world.name);
        launch
            .clone()
            .with("TIDINGS_DATABASE_URL", database_url)
            .with("TIDINGS_AMQP_URL", amqp_url)
            .with("SSL_CERT_FILE", authority.display())
            // Whomever this machine trusts otherwise.
            .with("SSL_CERT_DIR", "")
    }

    async fn doctor(&self, host: &str, authority: &Path) -> (i32, String) {
        self.over_tls(&self.world.launch().subcommand("doctor"), host, authority).finished().await
    }

    /// The doctor refuses both servers in a sentence with `why`, and a word of TLS's.
    async fn refuses(&self, host: &str, authority: &Path, why: &str, word: &str) {
        let (code, output) = self.doctor(host, authority).await;
        assert_eq!(code, 1, "{output}");
        for server in ["PostgreSQL", "RabbitMQ"] {
            let begins = format!("FAIL  the certificate of {server} at {host}:");
            let refused = |line: &str| line.starts_with(&begins) && line.contains(why) && line.contains(word);
            assert!(output.lines().any(refused), "{server}, {why}:\n{output}");
        }
    }
}

/// Writes a certificate where `SSL_CERT_FILE` can name it.
pub(crate) fn file(world: &World, name: &str, certificate: &str) -> PathBuf {
    let path = world.plugin_dir.join(name);
    std::fs::write(&path, certificate).expect("written");
    path
}

#[tokio::test]
async fn servers_whose_authority_is_trusted_serve_over_tls_and_all_others_are_refused_in_a_sentence() {
    let authority = Authority::new("our own");
    let mut servers = Servers::alone().await;
    let amqps_port = servers.offer_tls(&authority.identity("localhost", 1)).expect("TLS");
    let world = World::on(&servers, &["message"]).await;
    let trusted = file(&world, "ca.pem", &authority.certificate);
    let trusting = Trusting { world: &world, amqps_port };
    let mut inbox = world.inbox(&["k"]).await;

    // Rows, notifications, messages, and what is rejected: that comes back on a connection of its own.
    let mut daemon = trusting.over_tls(&often(&world), "localhost", &trusted).ready().await;
    send(&world, r#"{"routing_key": "k", "body": "secret"}"#).await;
    reject(&mut inbox).await;
    assert_eq!(inbox.next().await.text(), "secret");
    let ours = "SELECT bool_and(ssl) AND count(*) > 2 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
        WHERE application_name = 'tidings' AND datname = current_database()";
    assert!(world.value::<bool>(ours).await, "a session without TLS");
    let addr = daemon.http_addr().await;
    let doctor = world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr);
    let (code, output) = trusting.over_tls(&doctor, "localhost", &trusted).finished().await;
    assert!(code == 0 && !output.contains("FAIL"), "{output}");
    let (code, output) =
        trusting.over_tls(&world.launch().subcommand("dead"), "localhost", &trusted).args(["list"]).finished().await;
    assert_eq!(code, 0, "{output}");
    assert!(daemon.stop().await.success());

    // The authority of PostgreSQL alone may stand in its URL.
    let (postgres_port, _) = world.ports();
    let url = format!(
        "postgres://postgres@localhost:{postgres_port}/{}?sslmode=verify-full&sslrootcert={}",
        world.name,
        trusted.display()
    );
    let (code, output) = Launch::clone(&doctor).with("TIDINGS_DATABASE_URL", url).finished().await;
    assert!(code == 0 && output.contains("PostgreSQL answers at localhost"), "{output}");

    for (name, word) in [("a stranger", "UnknownIssuer"), ("our own", "BadSignature")] {
        let strange = file(&world, "strange.pem", &Authority::new(name).certificate);
        trusting.refuses("localhost", &strange, "nobody whom we trust has signed it", word).await;
    }
    trusting.refuses("localhost", Path::new("/nonexistent"), "this machine trusts nobody", "").await;
    trusting.refuses("127.0.0.1", &trusted, "it is another host's", "not valid for name").await;
    servers.show(&authority.identity("localhost", -1)).expect("shown");
    eventually("both expired certificates", async || {
        let (_, output) = trusting.doctor("localhost", &trusted).await;
        (output.matches("FAIL  the certificate of").count() == 2).then_some(())
    })
    .await;
    trusting.refuses("localhost", &trusted, "it has expired; renew it", "expired").await;

    // The daemon waits, in case that somebody renews it.
    let expired = trusting.over_tls(&often(&world), "localhost", &trusted);
    let mut daemon = expired.start();
    daemon.wait_for_line("the certificate of PostgreSQL at localhost").await;
    let mut other =
        expired.with("TIDINGS_DATABASE_URL", harness::world::database_url(postgres_port, &world.name)).start();
    other.wait_for_line("the certificate of RabbitMQ at localhost").await;
    servers.show(&authority.identity("localhost", 1)).expect("shown");
    for daemon in [&mut daemon, &mut other] {
        daemon.wait_for_line(" ready ").await;
    }
}
