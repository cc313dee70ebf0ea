//! Runs the blocks of a page with a shell, whose directory and variables are kept from block to block, and with `psql`.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use super::{Block, ExternalCommand, Page, Substitute, find_missing_line};
use crate::daemon::{Daemon, Launch};
use crate::servers::Servers;
use crate::world::{World, amqp_url, database_url};
use crate::{build, command_line, eventually, image, setup};

/// A user who follows a page in a world.
#[derive(Debug)]
pub struct Reader<'a> {
    world: &'a World,
    external_commands: &'a [ExternalCommand],
    /// Texts of the pages, and the texts that replace them in this world.
    replacements: Vec<(&'static str, String)>,
    /// The directory with the reader's own files.
    home: PathBuf,
    shell: Launch,
    daemon: Option<Daemon>,
    consumer: Option<Daemon>,
}

impl<'a> Reader<'a> {
    /// A reader with a shell in an empty directory.
    ///
    /// # Panics
    ///
    /// When the directory or a program in it cannot be made.
    #[must_use]
    pub fn new(world: &'a World, servers: &Servers, external_commands: &'a [ExternalCommand]) -> Self {
        let home = world.plugin_dir.with_extension("reader");
        let programs = home.join("programs");
        fs::create_dir_all(home.join("work/target")).expect("a directory");
        fs::create_dir_all(&programs).expect("a directory");
        std::os::unix::fs::symlink(&world.plugin_dir, home.join("work/target/plugins")).expect("linked");
        std::os::unix::fs::symlink(World::binary(), programs.join("tidings")).expect("linked");
        write_script(
            &programs,
            "rabbitmqctl",
            &servers.rabbitmqctl_script().expect("the tests have started the servers"),
        );
        let postgres_programs = setup::find_servers().expect("they are installed").postgres;
        for name in ["psql", "pg_dump", "pg_dumpall", "pg_restore"] {
            let command = command_line(&image::command(None, &postgres_programs.join(name)));
            write_script(&programs, name, &format!("#!/bin/sh\nexec {command} \"$@\"\n"));
        }
        write_script(&programs, "cargo", &build::cargo_script().expect("a way to build plugins"));
        fs::write(home.join("directory"), home.join("work").display().to_string()).expect("written");
        fs::write(home.join("variables"), "").expect("written");

        let (postgres, rabbitmq) = world.ports();
        let name = &world.name;
        let path = std::env::var("PATH").expect("there is one");
        let port =
            std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let shell = (world.launch().with_program(Path::new("bash")).without("CARGO_TARGET_DIR"))
            .with("PATH", format!("{}:{path}", programs.display()))
            .with("TIDINGS_HTTP_ADDR", format!("127.0.0.1:{port}"))
            .with("PGHOST", "127.0.0.1")
            .with("PGPORT", postgres)
            .with("PGUSER", "postgres")
            .with("PGDATABASE", name);
        let replacements = vec![
            ("127.0.0.1:5432/shop", format!("127.0.0.1:{postgres}/{name}")),
            ("127.0.0.1:5432", format!("127.0.0.1:{postgres}")),
            ("127.0.0.1:5672/shop", format!("127.0.0.1:{rabbitmq}/{name}")),
            ("-p shop", format!("-p {name}")),
            ("DATABASE shop ", format!("DATABASE {name} ")),
            ("/srv/plugins", world.plugin_dir.display().to_string()),
        ];
        Self { world, external_commands, replacements, home, shell, daemon: None, consumer: None }
    }

    /// Starts the daemon, for a page that expects a running one.
    ///
    /// # Panics
    ///
    /// When the daemon does not start.
    pub async fn start_daemon(&mut self) {
        self.daemon = Some(self.shell.clone().with_program(&World::binary()).args(["run"]).start_ready().await);
    }

    /// How to run `script` in the directory and with the variables that the blocks so far have left.
    ///
    /// # Panics
    ///
    /// Never.
    #[must_use]
    pub fn shell(&self, script: &str) -> Launch {
        let home = self.home.display();
        let script = format!(
            "set -euo pipefail\nsource {home}/variables\ncd \"$(cat {home}/directory)\"\n{}\n\
             export -p >{home}/variables\npwd >{home}/directory\n",
            self.localize(script)
        );
        self.shell.clone().args(["-c", &script])
    }

    /// Replaces the names and addresses of the pages in `text` by those of this world.
    fn localize(&self, text: &str) -> String {
        self.replacements.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
    }

    /// Runs all blocks of a page in order.
    ///
    /// # Panics
    ///
    /// When a block ends with another exit code or output than the page shows.
    pub async fn follow(&mut self, page: &Page) {
        let blocks = page.blocks();
        let mut blocks = blocks.iter().peekable();
        while let Some(block) = blocks.next() {
            let place = format!("{}:{}", page.path, block.line);
            let shown = blocks
                .next_if(|next| next.language == "text" && !next.has_mark("picture"))
                .map(|shown| self.localize(&shown.text));
            match block.language.as_str() {
                "sh" if block.has_mark("daemon") => self.run_with_daemon(&place, block).await,
                "sh" | "sql" => self.run_block(&place, block, shown.as_deref()).await,
                "text" if block.has_mark("picture") => {}
                "text" => panic!("{place}: a text is what the block before it shows, and there is none"),
                language => {
                    let file = block.marks.first().unwrap_or_else(|| {
                        panic!("{place}: a block of {language} with neither a program to run it nor the name of a file")
                    });
                    let directory = fs::read_to_string(self.home.join("directory")).expect("it is there");
                    fs::write(Path::new(directory.trim_end()).join(file), &block.text).expect("written");
                }
            }
        }
    }

    /// Runs a block that ends with `tidings run`, and keeps that daemon running in place of the previous one.
    async fn run_with_daemon(&mut self, place: &str, block: &Block) {
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().await;
        }
        let (before, last) = block.text.trim_end().rsplit_once('\n').expect("more than a line");
        assert_eq!(last, "tidings run", "{place}: it does not end with the daemon");
        self.run_program(&self.shell(before), "").await.0.expect("settings");
        self.daemon = Some(self.shell("exec tidings run").start_ready().await);
    }

    async fn run_block(&mut self, place: &str, block: &Block, shown: Option<&str>) {
        let exits = block.marks.iter().find_map(|mark| mark.strip_prefix("exits=")).unwrap_or("0");
        let (launch, input) = if block.language == "sql" {
            (self.shell("psql --no-psqlrc --set=ON_ERROR_STOP=1"), self.localize(&block.text))
        } else {
            let mut script = String::new();
            for line in block.commands() {
                match self
                    .external_commands
                    .iter()
                    .find(|external| external.matches(&line))
                    .map(|external| external.substitute)
                {
                    None => script.extend([&line, "\n"]),
                    Some(Substitute::Nothing) => {}
                    Some(Substitute::Shell(command)) => script.extend([command, "\n"]),
                    Some(Substitute::Deployment) => self.start_deployment().await,
                }
            }
            (self.shell(&script), String::new())
        };
        let attempt = async || {
            let (code, output) = self.run_program(&launch, &input).await;
            let code = code.map_or_else(|| "a signal".to_owned(), |code| code.to_string());
            if code != exits {
                return Err(format!("{place} ended with {code}, not {exits}:\n{output}"));
            }
            match shown.and_then(|shown| find_missing_line(shown, &output)) {
                None => Ok(()),
                Some(line) => Err(format!("{place} does not show\n{line}\nbut\n{output}")),
            }
        };
        if block.has_mark("again") {
            eventually(place, async || attempt().await.ok()).await;
        } else if let Err(sentence) = attempt().await {
            panic!("{sentence}");
        }
    }

    /// Runs a program to its end, and returns its exit code and its output.
    async fn run_program(&self, launch: &Launch, input: &str) -> (Option<i32>, String) {
        let (mut command, input) = (launch.command(), input.to_owned());
        command.env_remove("CARGO_TARGET_DIR").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ran = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn()?;
            // Fails if the program has closed its standard input.
            let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
            child.wait_with_output()
        });
        let output = ran.await.expect("it does not panic").expect("it runs");
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        (output.status.code(), text.concat())
    }

    async fn start_deployment(&mut self) {
        self.start_daemon().await;
        let (postgres, rabbitmq) = self.world.ports();
        let consumer = Launch::of_program(&build::rust_consumer().expect("the consumer builds"))
            .with("DATABASE_URL", database_url(postgres, &self.world.name))
            .with("AMQP_URL", amqp_url(rabbitmq, &self.world.name));
        let mut consumer = consumer.start();
        consumer.wait_for_line("ready").await;
        self.consumer = Some(consumer);
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.home);
        }
    }
}

/// Writes an executable script into the reader's directory of programs.
fn write_script(dir: &Path, name: &str, script: &str) {
    let path = dir.join(name);
    fs::write(&path, script).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("allowed");
}
