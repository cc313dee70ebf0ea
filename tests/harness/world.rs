//! A world is the environment of one test: a database, a virtual host, and a plugin directory, on servers that all
//! tests share.

use std::path::{Path, PathBuf};
use std::sync::{OnceLock, RwLock};

use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Row as _};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::consumer::{Broker, Inbox};
use crate::daemon::{Daemon, Launch};
use crate::servers::Servers;
pub use crate::servers::{database_url, execute};
use crate::{build, eventually};

/// The built programs.
struct Built {
    daemon: PathBuf,
    plugins: PathBuf,
    fixtures: PathBuf,
}

fn built() -> &'static Built {
    static BUILT: OnceLock<Built> = OnceLock::new();
    BUILT.get_or_init(|| Built {
        daemon: build::daemon().expect("the daemon builds"),
        plugins: build::plugins().expect("the plugins build"),
        fixtures: build::fixtures().expect("the fixtures build"),
    })
}

/// The program that worlds run, if it is another one than the built daemon.
static UNDER_TEST: RwLock<Option<PathBuf>> = RwLock::new(None);

/// Makes all worlds from now on those of another build of `tidings`: it migrates their databases, and their daemons run
/// it. Worlds that were made before must not start a daemon any more.
///
/// # Panics
///
/// When that build cannot migrate a database.
pub fn put_under_test(binary: &Path) {
    create_template(shared(), binary);
    *UNDER_TEST.write().expect("no holder of the lock panics") = Some(binary.to_owned());
}

/// The shared servers. A static is never dropped; the reaper stops the servers when this program ends.
static SHARED: OnceLock<Servers> = OnceLock::new();

/// The servers that all worlds of this program share, except those made with [`World::on_servers`].
fn shared() -> &'static Servers {
    SHARED.get_or_init(|| {
        let servers = Servers::start().expect("the servers start");
        create_template(&servers, &World::binary());
        servers
    })
}

/// Makes all worlds of this program share `servers`, which have other settings than those for tests.
///
/// # Panics
///
/// When a world has already been made.
pub fn share_servers(servers: Servers) {
    create_template(&servers, &World::binary());
    SHARED.set(servers).expect("before the first world");
}

/// The credentials `guest:guest` for the management API.
const GUEST: &str = "Basic Z3Vlc3Q6Z3Vlc3Q=";

/// The migrated database of which every world gets a copy.
const TEMPLATE: &str = "tidings_template";

fn create_template(servers: &Servers, daemon: &Path) {
    let create = || async {
        execute(servers.postgres_port, &format!("DROP DATABASE IF EXISTS {TEMPLATE}")).await;
        execute(servers.postgres_port, &format!("CREATE DATABASE {TEMPLATE}")).await;
        let mut launch =
            Launch::new(daemon, "migrate").with("TIDINGS_DATABASE_URL", database_url(servers.postgres_port, TEMPLATE));
        // For a run of all tests on a table of partitions.
        if let Ok(partitions) = std::env::var("HARNESS_PARTITIONS") {
            launch = launch.args(["--partitions", &partitions]);
        }
        let (code, output) = launch.run_to_end().await;
        assert_eq!(code, 0, "{output}");
    };
    // The caller may be inside an asynchronous runtime, which must not be blocked, so this needs a thread and a
    // runtime.
    std::thread::scope(|scope| {
        let runtime = || tokio::runtime::Runtime::new().expect("a runtime").block_on(create());
        scope.spawn(runtime).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// The environment of one test.
#[derive(Debug)]
pub struct World {
    /// The database.
    pub db: PgPool,
    /// A consumer's connection to the virtual host.
    pub broker: Broker,
    /// The plugin directory, empty at first.
    pub plugin_dir: PathBuf,
    /// The name of both the database and the virtual host.
    pub name: String,
    /// The ports of PostgreSQL and RabbitMQ.
    ports: (u16, u16),
    management_port: u16,
}

impl World {
    /// Makes a world without plugins.
    ///
    /// # Panics
    ///
    /// When the world cannot be made.
    pub async fn empty() -> Self {
        Self::create(shared(), None).await
    }

    /// Makes a world without plugins, in whose virtual host a queue that is declared without a type is a quorum queue.
    ///
    /// # Panics
    ///
    /// When the world cannot be made.
    pub async fn of_quorum_queues() -> Self {
        Self::create(shared(), Some("quorum")).await
    }

    /// Makes a world on `servers`, which the test may stop and restart, with these plugins.
    ///
    /// # Panics
    ///
    /// When the world cannot be made.
    pub async fn on_servers(servers: &Servers, plugins: &[&str]) -> Self {
        create_template(servers, &Self::binary());
        let world = Self::create(servers, None).await;
        for plugin in plugins {
            world.install(plugin);
        }
        world
    }

    async fn create(servers: &Servers, default_queue_type: Option<&str>) -> Self {
        let name = format!("t{}", Uuid::new_v4().simple());
        let port = servers.postgres_port;
        execute(port, &format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}")).await;
        let db = PgPoolOptions::new().max_connections(4).connect(&database_url(port, &name)).await.expect("a database");
        create_vhost(servers.management_port, &name, default_queue_type);
        let broker = Broker::connect(&amqp_url(servers.rabbitmq_port, &name)).await;
        let plugin_dir = crate::target().join("plugin-dirs").join(&name);
        std::fs::create_dir_all(&plugin_dir).expect("a directory");
        let management_port = servers.management_port;
        Self { db, broker, plugin_dir, name, ports: (port, servers.rabbitmq_port), management_port }
    }

    /// Makes a world with these plugins of `plugins/` or `tests/fixtures/`.
    ///
    /// # Panics
    ///
    /// When the world cannot be made.
    pub async fn with_plugins(plugins: &[&str]) -> Self {
        let world = Self::empty().await;
        for plugin in plugins {
            world.install(plugin);
        }
        world
    }

    /// Puts a plugin of `plugins/` or `tests/fixtures/` into the plugin directory.
    ///
    /// # Panics
    ///
    /// When there is no such plugin.
    pub fn install(&self, plugin: &str) {
        self.put(&format!("{plugin}.wasm"), &std::fs::read(Self::built_plugin(plugin)).expect("it is there"));
    }

    /// The built file of a plugin of `plugins/` or `tests/fixtures/`.
    ///
    /// # Panics
    ///
    /// When there is no such plugin.
    #[must_use]
    pub fn built_plugin(plugin: &str) -> PathBuf {
        let file = format!("{plugin}.wasm");
        let found = [&built().plugins, &built().fixtures].map(|dir| dir.join(&file));
        found.into_iter().find(|path| path.exists()).unwrap_or_else(|| panic!("no plugin {plugin}"))
    }

    /// The path of the program `tidings`.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn binary() -> PathBuf {
        let under_test = UNDER_TEST.read().expect("no holder of the lock panics").clone();
        under_test.unwrap_or_else(|| built().daemon.clone())
    }

    /// Writes `bytes` into the plugin directory as `file`, atomically.
    ///
    /// # Panics
    ///
    /// When the file cannot be written.
    pub fn put(&self, file: &str, bytes: &[u8]) {
        let aside = self.plugin_dir.join(format!(".{file}"));
        std::fs::write(&aside, bytes).expect("written");
        std::fs::rename(aside, self.plugin_dir.join(file)).expect("renamed");
    }

    /// Runs `tidings` with `arguments` in this world until it ends, and returns its exit code and its output.
    pub async fn tidings<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> (i32, String) {
        let mut arguments = arguments.into_iter();
        let first = arguments.next().map(|first| first.as_ref().to_string_lossy().into_owned()).unwrap_or_default();
        self.launch().subcommand(&first).args(arguments).run_to_end().await
    }

    /// Removes the database and the virtual host, for tests in which they are large.
    ///
    /// # Panics
    ///
    /// When a server refuses.
    pub async fn remove(self) {
        self.db.close().await;
        execute(self.ports.0, &format!("DROP DATABASE {} WITH (FORCE)", self.name)).await;
        let url = format!("http://127.0.0.1:{}/api/vhosts/{}", self.management_port, self.name);
        let answer = ureq::delete(&url).header("Authorization", GUEST).call();
        answer.unwrap_or_else(|error| panic!("the virtual host {} could not be removed: {error}", self.name));
        let _ = std::fs::remove_dir_all(&self.plugin_dir);
        let _ = std::fs::remove_dir_all(self.state_dir());
    }

    /// The settings with which a daemon runs in this world.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let (postgres_port, rabbitmq_port) = self.ports;
        Launch::new(&Self::binary(), "run")
            .with("TIDINGS_DATABASE_URL", database_url(postgres_port, &self.name))
            .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq_port, &self.name))
            .with("TIDINGS_PLUGIN_DIR", self.plugin_dir.display())
            .with("TIDINGS_STATE_DIR", self.state_dir().display())
            // Any free port; the daemon writes it to its log.
            .with("TIDINGS_HTTP_ADDR", "127.0.0.1:0")
    }

    /// The state directory of the daemons of this world, which they create.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        crate::target().join("plugin-dirs").join(format!("{}.state", self.name))
    }

    /// Starts a daemon whose sweep comes only every ten minutes, so that only wakes and due times make it act during a
    /// test.
    ///
    /// # Panics
    ///
    /// When the daemon does not start.
    pub async fn start_daemon(&self) -> Daemon {
        self.launch().with("TIDINGS_SWEEP_MS", 600_000).start_ready().await
    }

    /// Starts a daemon as [`World::start_daemon`] does, and waits for minutes if need be, because many plugins take long
    /// to load.
    ///
    /// # Panics
    ///
    /// When the daemon does not start within minutes.
    pub async fn start_daemon_with_many_plugins(&self) -> Daemon {
        let mut daemon = self.launch().with("TIDINGS_SWEEP_MS", 600_000).start();
        daemon.wait_longer_for_line(" ready ").await;
        daemon
    }

    /// The ports of PostgreSQL and RabbitMQ.
    #[must_use]
    pub fn ports(&self) -> (u16, u16) {
        self.ports
    }

    /// The URL of RabbitMQ's management API, with user and password.
    #[must_use]
    pub fn management_url(&self) -> String {
        format!("http://guest:guest@127.0.0.1:{}", self.management_port)
    }

    /// Sends a request to RabbitMQ's management API, and returns the answer; an empty answer is null.
    ///
    /// # Panics
    ///
    /// When RabbitMQ refuses the request.
    #[must_use]
    pub fn manage(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        manage(&self.management_url(), method, path, body)
    }

    /// Declares a queue that is bound to the daemon's exchange with `keys` and dead-letters to `tidings.dlx`, and
    /// consumes from it.
    pub async fn inbox(&self, keys: &[&str]) -> Inbox {
        let mut arguments = FieldTable::default();
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
        self.broker.inbox("tidings", &format!("inbox.{}", keys.join("+")), keys, arguments).await
    }

    /// Runs a statement, and returns the number of affected rows.
    ///
    /// # Panics
    ///
    /// When the statement fails.
    pub async fn sql(&self, sql: &str) -> u64 {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&self.db).await {
            Ok(done) => done.rows_affected(),
            Err(error) => panic!("{sql}: {error}"),
        }
    }

    /// Runs a query, and returns the first column of its first row.
    ///
    /// # Panics
    ///
    /// When the query fails, returns no row, or a value of another type.
    pub async fn value<T>(&self, sql: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(&self.db).await {
            Ok(row) => row.get(0),
            Err(error) => panic!("{sql}: {error}"),
        }
    }

    /// Runs a statement that must fail, and returns the error message.
    ///
    /// # Panics
    ///
    /// When the statement does not fail.
    pub async fn expect_error(&self, sql: &str) -> String {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&self.db).await {
            Ok(_) => panic!("{sql} did not fail"),
            Err(error) => error.to_string(),
        }
    }

    /// Repeats a query until it returns `true`.
    ///
    /// # Panics
    ///
    /// When it does not return `true` in time.
    pub async fn wait_until(&self, sql: &str) {
        eventually(sql, async || self.value::<bool>(sql).await.then_some(())).await;
    }

    /// The current time of the database clock.
    pub async fn now(&self) -> OffsetDateTime {
        self.value("SELECT clock_timestamp()").await
    }
}

/// The URL of a virtual host.
#[must_use]
pub fn amqp_url(port: u16, vhost: &str) -> String {
    format!("amqp://guest:guest@127.0.0.1:{port}/{vhost}")
}

fn create_vhost(management_port: u16, vhost: &str, default_queue_type: Option<&str>) {
    // RabbitMQ 3.10 reads the first name, later releases the second.
    let body = default_queue_type.map_or_else(
        || json!({}),
        |queue_type| json!({ "defaultqueuetype": queue_type, "default_queue_type": queue_type }),
    );
    manage(&format!("http://guest:guest@127.0.0.1:{management_port}"), "PUT", &format!("vhosts/{vhost}"), Some(&body));
}

/// Sends a request to RabbitMQ's management API, and returns the answer; an empty answer is null.
fn manage(url: &str, method: &str, path: &str, body: Option<&Value>) -> Value {
    let request = ureq::http::Request::builder().method(method).uri(format!("{url}/api/{path}"));
    let request = request.header("Content-Type", "application/json");
    let text = body.map(ToString::to_string).unwrap_or_default();
    let mut answer = ureq::run(request.body(text).expect("a request"))
        .unwrap_or_else(|error| panic!("{method} {path} of RabbitMQ's management API failed: {error}"));
    let text = answer.body_mut().read_to_string().expect("text");
    if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") }
}
