//! TLS connections to both servers, whose certificates are signed by a private authority. If the daemon trusts the
//! authority, everything works. A server that cannot prove its identity is refused, with an error that says why and
//! what to do.

use std::path::{Path, PathBuf};

use harness::authority::Authority;
use harness::daemon::Launch;
use harness::eventually;
use harness::servers::Servers;
use harness::world::World;

use crate::dead_letters::replay::{launch_with_frequent_passes, reject_next, schedule_message};

/// A world whose servers have certificates for `localhost`.
pub(crate) struct TlsWorld<'a> {
    pub(crate) world: &'a World,
    /// The port on which RabbitMQ accepts TLS.
    pub(crate) amqps_port: u16,
}

impl TlsWorld<'_> {
    /// Makes `launch` connect to `host` over TLS and trust only the authority in the file `authority`.
    pub(crate) fn launch_over_tls(&self, launch: &Launch, host: &str, authority: &Path) -> Launch {
        let Self { world, amqps_port } = self;
        let (postgres_port, _) = world.ports();
        let database_url = format!("postgres://postgres@{host}:{postgres_port}/{}?sslmode=verify-full", world.name);
        let amqp_url = format!("amqps://guest:guest@{host}:{amqps_port}/{}", world.name);
        launch
            .clone()
            .with("TIDINGS_DATABASE_URL", database_url)
            .with("TIDINGS_AMQP_URL", amqp_url)
            .with("SSL_CERT_FILE", authority.display())
            // Do not trust the authorities that this machine trusts by default.
            .with("SSL_CERT_DIR", "")
    }

    async fn run_doctor(&self, host: &str, authority: &Path) -> (i32, String) {
        self.launch_over_tls(&self.world.launch().subcommand("doctor"), host, authority).run_to_end().await
    }

    /// Checks that the doctor refuses both servers, in lines that contain `reason` and the TLS error `word`.
    async fn check_refused(&self, host: &str, authority: &Path, reason: &str, word: &str) {
        let (code, output) = self.run_doctor(host, authority).await;
        assert_eq!(code, 1, "{output}");
        for server in ["PostgreSQL", "RabbitMQ"] {
            let begins = format!("FAIL  the certificate of {server} at {host}:");
            let refused = |line: &str| line.starts_with(&begins) && line.contains(reason) && line.contains(word);
            assert!(output.lines().any(refused), "{server}, {reason}:\n{output}");
        }
    }
}

/// Writes a certificate to a file for `SSL_CERT_FILE`, and returns its path.
pub(crate) fn write_certificate(world: &World, name: &str, certificate: &str) -> PathBuf {
    let path = world.plugin_dir.join(name);
    std::fs::write(&path, certificate).expect("written");
    path
}

#[tokio::test]
async fn servers_with_trusted_certificates_work_over_tls_and_all_others_are_refused_with_the_reason() {
    let authority = Authority::new("our own");
    let mut servers = Servers::start_private_async().await;
    let amqps_port = servers.offer_tls(&authority.identity("localhost", 1)).expect("TLS");
    let world = World::on_servers(&servers, &["message"]).await;
    let trusted = write_certificate(&world, "ca.pem", &authority.certificate);
    let trusting = TlsWorld { world: &world, amqps_port };
    let mut inbox = world.inbox(&["k"]).await;

    // This uses every connection: for rows, notifications and messages, and the separate one for dead letters.
    let mut daemon =
        trusting.launch_over_tls(&launch_with_frequent_passes(&world), "localhost", &trusted).start_ready().await;
    schedule_message(&world, r#"{"routing_key": "k", "body": "secret"}"#).await;
    reject_next(&mut inbox).await;
    assert_eq!(inbox.next().await.text(), "secret");
    let ours = "SELECT bool_and(ssl) AND count(*) > 2 FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
        WHERE application_name = 'tidings' AND datname = current_database()";
    assert!(world.value::<bool>(ours).await, "a session without TLS");
    let addr = daemon.http_addr().await;
    let doctor = world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr);
    let (code, output) = trusting.launch_over_tls(&doctor, "localhost", &trusted).run_to_end().await;
    assert!(code == 0 && !output.contains("FAIL"), "{output}");
    let (code, output) = trusting
        .launch_over_tls(&world.launch().subcommand("dead"), "localhost", &trusted)
        .args(["list"])
        .run_to_end()
        .await;
    assert_eq!(code, 0, "{output}");
    assert!(daemon.stop().await.success());

    // PostgreSQL's authority may also be given in its URL.
    let (postgres_port, _) = world.ports();
    let url = format!(
        "postgres://postgres@localhost:{postgres_port}/{}?sslmode=verify-full&sslrootcert={}",
        world.name,
        trusted.display()
    );
    let (code, output) = Launch::clone(&doctor).with("TIDINGS_DATABASE_URL", url).run_to_end().await;
    assert!(code == 0 && output.contains("PostgreSQL answers at localhost"), "{output}");

    for (name, word) in [("a stranger", "UnknownIssuer"), ("our own", "BadSignature")] {
        let strange = write_certificate(&world, "strange.pem", &Authority::new(name).certificate);
        trusting
            .check_refused("localhost", &strange, "no authority that this machine trusts has signed it", word)
            .await;
    }
    trusting.check_refused("localhost", Path::new("/nonexistent"), "this machine trusts no authority", "").await;
    trusting.check_refused("127.0.0.1", &trusted, "it is another host's", "not valid for name").await;
    servers.replace_certificate(&authority.identity("localhost", -1)).expect("shown");
    eventually("both expired certificates", async || {
        let (_, output) = trusting.run_doctor("localhost", &trusted).await;
        (output.matches("FAIL  the certificate of").count() == 2).then_some(())
    })
    .await;
    trusting.check_refused("localhost", &trusted, "it has expired; renew it", "expired").await;

    // The daemon waits until the certificate is renewed.
    let expired = trusting.launch_over_tls(&launch_with_frequent_passes(&world), "localhost", &trusted);
    let mut daemon = expired.start();
    daemon.wait_for_line("the certificate of PostgreSQL at localhost").await;
    let mut other =
        expired.with("TIDINGS_DATABASE_URL", harness::world::database_url(postgres_port, &world.name)).start();
    other.wait_for_line("the certificate of RabbitMQ at localhost").await;
    servers.replace_certificate(&authority.identity("localhost", 1)).expect("shown");
    for daemon in [&mut daemon, &mut other] {
        daemon.wait_for_line(" ready ").await;
    }
}
