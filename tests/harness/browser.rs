//! A headless Chromium of our own, driven as a person would: by keys and clicks. Everything is seen through the page itself.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fantoccini::actions::{InputSource as _, KeyAction, KeyActions};
use fantoccini::key::Key;
use fantoccini::wd::{Capabilities, WebDriverCompatibleCommand};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use url::{ParseError, Url};

use crate::{eventually, eventually_within, setup};

/// For the start of a browser, on a machine that is busy with a hundred other tests.
const START: Duration = Duration::from_mins(2);

/// The browser; ended when dropped.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    /// Where the driver has its session.
    session: String,
    client: Client,
}

/// A command of Chromium's own.
#[derive(Debug)]
struct Chrome {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Chrome {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _: &Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.body.to_string()))
    }
}

impl Browser {
    /// A browser as wide as a desk, in the light.
    ///
    /// # Panics
    ///
    /// When there is none and it cannot be installed, or it does not start.
    pub async fn start() -> Self {
        let program = setup::chromium().expect("a browser");
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr()).expect("a port").port();
        let mut driver = Command::new(&program.driver)
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("the driver starts");
        let said = BufReader::new(driver.stdout.take().expect("piped"));
        // Read to its end, so that it never waits for us.
        let (started, starts) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut lines = said.lines().map_while(Result::ok);
            if lines.any(|line| line.contains("started successfully")) {
                let _ = started.send(());
            }
            lines.for_each(drop);
        });
        tokio::time::timeout(START, starts).await.expect("the driver starts in time").expect("the driver starts");
        let options = json!({
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": {
                "binary": program.browser,
                // Its sandbox does not start as root; it shows nothing but our own page.
                "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"],
            },
        });
        let Value::Object(options) = options else { unreachable!("it is an object") };
        let url = format!("http://127.0.0.1:{port}");
        let mut builder = ClientBuilder::new(HttpConnector::new());
        let client = builder.capabilities(options as Capabilities).connect(&url);
        let client = tokio::time::timeout(START, client).await.expect("the browser starts in time");
        let client = client.expect("the browser starts");
        let session = client.session_id().await.expect("asked").expect("a session");
        let browser = Self { driver, session: format!("{url}/session/{session}"), client };
        browser.look(1280, false).await;
        browser
    }

    async fn chrome(&self, path: &'static str, body: Value) -> Value {
        self.client.issue_cmd(Chrome { path, body }).await.expect("the browser does it")
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.chrome("goog/cdp/execute", json!({ "cmd": command, "params": parameters })).await
    }

    /// Makes it so wide, in pixels, and light or dark.
    pub async fn look(&self, width: u32, dark: bool) {
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
        let theme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.devtools("Emulation.setEmulatedMedia", media).await;
    }

    /// Opens a page, and waits until it has loaded.
    ///
    /// # Panics
    ///
    /// When it does not load.
    pub async fn open(&self, url: &str) {
        eventually_within(START, url, async || self.client.goto(url).await.ok()).await;
    }

    /// What a script in the page returns.
    ///
    /// # Panics
    ///
    /// When it throws.
    pub async fn run(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Waits until an expression in the page is true.
    ///
    /// # Panics
    ///
    /// When it is not in time.
    pub async fn until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        eventually(expression, async || (self.run(&script).await == Value::Bool(true)).then_some(())).await;
    }

    /// The text that is shown of the first thing that `css` selects.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub async fn text(&self, css: &str) -> String {
        let found = self.client.find(Locator::Css(css)).await;
        found.unwrap_or_else(|error| panic!("{css}: {error}")).text().await.expect("a text")
    }

    /// Waits until the text that is shown of it contains `part`.
    ///
    /// # Panics
    ///
    /// When it does not in time.
    pub async fn until_text(&self, css: &str, part: &str) {
        let mut seen = String::new();
        let shows = async || {
            if let Ok(found) = self.client.find(Locator::Css(css)).await
                && let Ok(text) = found.text().await
            {
                seen = text;
            }
            seen.contains(part).then_some(())
        };
        eventually(&format!("{part:?} in {css}"), shows).await;
    }

    /// Clicks on it, as soon as it can be clicked on.
    ///
    /// # Panics
    ///
    /// When it cannot in time.
    pub async fn click(&self, css: &str) {
        eventually(&format!("a click on {css}"), async || {
            let found = self.client.find(Locator::Css(css)).await.ok()?;
            found.click().await.ok()
        })
        .await;
    }

    /// Types into whatever has the focus.
    ///
    /// # Panics
    ///
    /// When the browser does not take it.
    pub async fn type_in(&self, text: &str) {
        let mut keys = KeyActions::new("keyboard".to_owned());
        for value in text.chars() {
            keys = keys.then(KeyAction::Down { value }).then(KeyAction::Up { value });
        }
        self.client.perform_actions(keys).await.expect("typed");
    }

    /// Presses a key.
    pub async fn press(&self, key: Key) {
        self.type_in(&char::from(key).to_string()).await;
    }

    /// Goes on with the Tab key until the focus is on what `css` selects.
    ///
    /// # Panics
    ///
    /// When it never is.
    pub async fn tab_to(&self, css: &str) {
        let there = format!("return document.activeElement.matches({})", Value::from(css));
        for _ in 0..200 {
            if self.run(&there).await == Value::Bool(true) {
                return;
            }
            self.press(Key::Tab).await;
        }
        panic!("nobody gets to {css} with the Tab key");
    }

    /// What the browser complained of since this was asked last.
    pub async fn complaints(&self) -> Vec<String> {
        let log = self.chrome("se/log", json!({ "type": "browser" })).await;
        let lines = log.as_array().map(Vec::as_slice).unwrap_or_default();
        lines.iter().map(|line| line["message"].to_string()).collect()
    }

    /// Writes down what all of the page looks like, as PNG.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub async fn picture(&self, file: &Path) {
        self.run("scrollTo(0, 0)").await;
        let size = self.run("return [innerWidth, document.documentElement.scrollHeight]").await;
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let parameters = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let picture = self.devtools("Page.captureScreenshot", parameters).await;
        let picture = base64::Engine::decode(
            &base64::engine::general_purpose::STANDARD,
            picture["data"].as_str().expect("a picture"),
        );
        std::fs::create_dir_all(file.parent().expect("a directory")).expect("a directory");
        std::fs::write(file, picture.expect("base64")).expect("written");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends the browser, which is in a process group of its own.
        let _ = ureq::delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
