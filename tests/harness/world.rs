//! One test's own world: a database, a virtual host, and the plugins it needs, on servers that all tests share.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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

/// What was built.
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

/// The reaper ends them with this program; nothing drops a static.
static SHARED: OnceLock<Servers> = OnceLock::new();

/// The servers that all worlds of this program share, but for those with servers of their own.
fn shared() -> &'static Servers {
    SHARED.get_or_init(|| {
        let servers = Servers::start().expect("servers of our own");
        template(&servers, &built().daemon);
        servers
    })
}

/// Has all worlds of this program share these servers, which are set up otherwise than for tests.
///
/// # Panics
///
/// When there is a world already.
pub fn share(servers: Servers) {
    template(&servers, &built().daemon);
    SHARED.set(servers).expect("before the first world");
}

/// guest:guest
const GUEST: &str = "Basic Z3Vlc3Q6Z3Vlc3Q=";

/// The database that every test's is a copy of, migrated by the binary.
const TEMPLATE: &str = "tidings_template";

fn template(servers: &Servers, daemon: &Path) {
    let create = || async {
        execute(servers.postgres_port, &format!("DROP DATABASE IF EXISTS {TEMPLATE}")).await;
        execute(servers.postgres_port, &format!("CREATE DATABASE {TEMPLATE}")).await;
        let launch =
            Launch::new(daemon, "migrate").with("TIDINGS_DATABASE_URL", database_url(servers.postgres_port, TEMPLATE));
        let (code, output) = launch.finished().await;
        assert_eq!(code, 0, "{output}");
    };
    // We may be inside a runtime, which must not be blocked.
    std::thread::scope(|scope| {
        let runtime = || tokio::runtime::Runtime::new().expect("a runtime").block_on(create());
        scope.spawn(runtime).join().expect("the template is made");
    });
}

/// One test's own world.
#[derive(Debug)]
pub struct World {
    /// Its database.
    pub db: PgPool,
    /// Its virtual host, as a consumer sees it.
    pub broker: Broker,
    /// Its plugin directory, empty at first.
    pub plugin_dir: PathBuf,
    /// The name of its database and virtual host.
    pub name: String,
    /// Where PostgreSQL and RabbitMQ listen.
    ports: (u16, u16),
    management_port: u16,
}

impl World {
    /// A world without a plugin and without a daemon.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub async fn empty() -> Self {
        Self::made(shared(), None).await
    }

    /// A world without a plugin and without a daemon, in whose virtual host a queue declared without a type is a quorum queue.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub async fn of_quorum_queues() -> Self {
        Self::made(shared(), Some("quorum")).await
    }

    /// A world on servers of its own, which may be stopped and started again.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub async fn on(servers: &Servers, plugins: &[&str]) -> Self {
        template(servers, &built().daemon);
        let world = Self::made(servers, None).await;
        for plugin in plugins {
            world.install(plugin);
        }
        world
    }

    async fn made(servers: &Servers, default_queue_type: Option<&str>) -> Self {
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

    /// A world with these plugins of the repository or of tests/fixtures.
    ///
    /// # Panics
    ///
    /// When it cannot be made.
    pub async fn with(plugins: &[&str]) -> Self {
        let world = Self::empty().await;
        for plugin in plugins {
            world.install(plugin);
        }
        world
    }

    /// Puts a plugin into the directory.
    ///
    /// # Panics
    ///
    /// When there is no such plugin.
    pub fn install(&self, plugin: &str) {
        self.put(&format!("{plugin}.wasm"), &std::fs::read(Self::built(plugin)).expect("it is there"));
    }

    /// The file of a plugin of the repository or of tests/fixtures, as it was built.
    ///
    /// # Panics
    ///
    /// When there is no such plugin.
    #[must_use]
    pub fn built(plugin: &str) -> PathBuf {
        let file = format!("{plugin}.wasm");
        let found = [&built().plugins, &built().fixtures].map(|dir| dir.join(&file));
        found.into_iter().find(|path| path.exists()).unwrap_or_else(|| panic!("no plugin {plugin}"))
    }

    /// The daemon's program.
    #[must_use]
    pub fn binary() -> PathBuf {
        built().daemon.clone()
    }

    /// Puts bytes into the plugin directory as `file`, all of them or nothing.
    ///
    /// # Panics
    ///
    /// When it cannot.
    pub fn put(&self, file: &str, bytes: &[u8]) {
        let aside = self.plugin_dir.join(format!(".{file}"));
        std::fs::write(&aside, bytes).expect("written");
        std::fs::rename(aside, self.plugin_dir.join(file)).expect("renamed");
    }

    /// Runs `tidings` with `arguments` in this world to its end, and returns its exit code and what it wrote.
    pub async fn tidings<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> (i32, String) {
        let mut arguments = arguments.into_iter();
        let first = arguments.next().map(|first| first.as_ref().to_string_lossy().into_owned()).unwrap_or_default();
        self.launch().subcommand(&first).args(arguments).finished().await
    }

    /// Takes away its database and its virtual host, which may be large.
    ///
    /// # Panics
    ///
    /// When it cannot.
    pub async fn remove(self) {
        self.db.close().await;
        execute(self.ports.0, &format!("DROP DATABASE {} WITH (FORCE)", self.name)).await;
        let url = format!("http://127.0.0.1:{}/api/vhosts/{}", self.management_port, self.name);
        let answer = ureq::delete(&url).header("Authorization", GUEST).call();
        answer.unwrap_or_else(|error| panic!("the virtual host {} could not be removed: {error}", self.name));
        let _ = std::fs::remove_dir_all(&self.plugin_dir);
        let _ = std::fs::remove_dir_all(self.state_dir());
    }

    /// How to start a daemon for this world.
    #[must_use]
    pub fn launch(&self) -> Launch {
        let (postgres_port, rabbitmq_port) = self.ports;
        Launch::new(&built().daemon, "run")
            .with("TIDINGS_DATABASE_URL", database_url(postgres_port, &self.name))
            .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq_port, &self.name))
            .with("TIDINGS_PLUGIN_DIR", self.plugin_dir.display())
            .with("TIDINGS_STATE_DIR", self.state_dir().display())
            // Any port that is free: the log says which.
            .with("TIDINGS_HTTP_ADDR", "127.0.0.1:0")
    }

    /// What its daemons remember; made by them.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        crate::target().join("plugin-dirs").join(format!("{}.state", self.name))
    }

    /// A running daemon, with a sweep so long that only wakes and due times can be what makes it act.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub async fn daemon(&self) -> Daemon {
        self.launch().with("TIDINGS_SWEEP_MS", 600_000).ready().await
    }

    /// The same with many plugins, which take their time to load.
    ///
    /// # Panics
    ///
    /// When it does not start within minutes.
    pub async fn daemon_of_many(&self) -> Daemon {
        let mut daemon = self.launch().with("TIDINGS_SWEEP_MS", 600_000).start();
        daemon.wait_longer_for_line(" ready ").await;
        daemon
    }

    /// The ports of PostgreSQL and RabbitMQ.
    #[must_use]
    pub fn ports(&self) -> (u16, u16) {
        self.ports
    }

    /// Where RabbitMQ's management API is, with the user and the password.
    #[must_use]
    pub fn management_url(&self) -> String {
        format!("http://guest:guest@127.0.0.1:{}", self.management_port)
    }

    /// Asks RabbitMQ's management API, or tells it something; an answer without a text is null.
    ///
    /// # Panics
    ///
    /// When it refuses.
    #[must_use]
    pub fn manage(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        manage(&self.management_url(), method, path, body)
    }

    /// A queue of this world, bound to the daemon's exchange with `keys`, and rejecting to its dead letters.
    pub async fn inbox(&self, keys: &[&str]) -> Inbox {
        let mut arguments = FieldTable::default();
        arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
        self.broker.inbox("tidings", &format!("inbox.{}", keys.join("+")), keys, arguments).await
    }

    /// Runs a statement, and returns how many rows it touched.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub async fn sql(&self, sql: &str) -> u64 {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&self.db).await {
            Ok(done) => done.rows_affected(),
            Err(error) => panic!("{sql}: {error}"),
        }
    }

    /// The one value that a statement answers with.
    ///
    /// # Panics
    ///
    /// When it fails, or answers otherwise.
    pub async fn value<T>(&self, sql: &str) -> T
    where
        T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
    {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(&self.db).await {
            Ok(row) => row.get(0),
            Err(error) => panic!("{sql}: {error}"),
        }
    }

    /// The message of the error with which a statement fails.
    ///
    /// # Panics
    ///
    /// When it does not fail.
    pub async fn error(&self, sql: &str) -> String {
        match sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&self.db).await {
            Ok(_) => panic!("{sql} did not fail"),
            Err(error) => error.to_string(),
        }
    }

    /// Waits until a statement answers `true`.
    ///
    /// # Panics
    ///
    /// When it does not in time.
    pub async fn until(&self, sql: &str) {
        eventually(sql, async || self.value::<bool>(sql).await.then_some(())).await;
    }

    /// Now, by the database clock.
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
    // The first name is that of 3.10, the second that of later releases.
    let body = default_queue_type.map_or_else(
        || json!({}),
        |queue_type| json!({ "defaultqueuetype": queue_type, "default_queue_type": queue_type }),
    );
    manage(&format!("http://guest:guest@127.0.0.1:{management_port}"), "PUT", &format!("vhosts/{vhost}"), Some(&body));
}

/// Asks RabbitMQ's management API, or tells it something; an answer without a text is null.
fn manage(url: &str, method: &str, path: &str, body: Option<&Value>) -> Value {
    let request = ureq::http::Request::builder().method(method).uri(format!("{url}/api/{path}"));
    let request = request.header("Content-Type", "application/json");
    let text = body.map(ToString::to_string).unwrap_or_default();
    let mut answer = ureq::run(request.body(text).expect("a request"))
        .unwrap_or_else(|error| panic!("{method} {path} of RabbitMQ's management API failed: {error}"));
    let text = answer.body_mut().read_to_string().expect("text");
    if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") }
}
