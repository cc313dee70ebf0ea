//! A headless Chromium that tests control with keys and clicks, as a user would. Tests check only what the page itself
//! shows.

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

/// How long the start of a browser or the loading of a page may take on a machine that runs a hundred other tests.
const START: Duration = Duration::from_mins(2);

/// A running browser. Dropping this value ends it.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    /// The URL of the driver's session.
    session: String,
    client: Client,
}

/// A command of the driver that only Chromium has.
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
    /// Starts a browser with a window 1280 pixels wide and a light colour scheme.
    ///
    /// # Panics
    ///
    /// When Chromium cannot be installed or does not start.
    pub async fn start() -> Self {
        let program = setup::find_chromium().expect("a browser");
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr()).expect("a port").port();
        let mut driver = Command::new(&program.driver)
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("the driver starts");
        let driver_output = BufReader::new(driver.stdout.take().expect("piped"));
        // Its output is read until it ends, so that the driver never blocks on a full pipe.
        let (started, starts) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut lines = driver_output.lines().map_while(Result::ok);
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
                // Chromium's sandbox does not start as root. It is not needed: the browser only opens the daemon's
                // page.
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
        browser.set_view(1280, false).await;
        browser
    }

    async fn run_chrome_command(&self, path: &'static str, body: Value) -> Value {
        self.client.issue_cmd(Chrome { path, body }).await.expect("the browser does it")
    }

    async fn run_devtools_command(&self, command: &str, parameters: Value) -> Value {
        self.run_chrome_command("goog/cdp/execute", json!({ "cmd": command, "params": parameters })).await
    }

    /// Sets the width of the window in pixels, and a light or dark colour scheme.
    pub async fn set_view(&self, width: u32, dark: bool) {
        let size = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.run_devtools_command("Emulation.setDeviceMetricsOverride", size).await;
        let theme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.run_devtools_command("Emulation.setEmulatedMedia", media).await;
    }

    /// Opens a page and waits until it has loaded.
    ///
    /// # Panics
    ///
    /// When the page does not load in time.
    pub async fn open(&self, url: &str) {
        eventually_within(START, url, async || self.client.goto(url).await.ok()).await;
    }

    /// Runs a script in the page and returns its result.
    ///
    /// # Panics
    ///
    /// When the script throws.
    pub async fn run_script(&self, script: &str) -> Value {
        self.client.execute(script, Vec::new()).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Waits until a JavaScript expression in the page is true.
    ///
    /// # Panics
    ///
    /// When it is not true in time.
    pub async fn wait_until(&self, expression: &str) {
        let script = format!("return Boolean({expression})");
        eventually(expression, async || (self.run_script(&script).await == Value::Bool(true)).then_some(())).await;
    }

    /// The visible text of the first element that `css` selects.
    ///
    /// # Panics
    ///
    /// When no element matches.
    pub async fn text(&self, css: &str) -> String {
        let found = self.client.find(Locator::Css(css)).await;
        found.unwrap_or_else(|error| panic!("{css}: {error}")).text().await.expect("a text")
    }

    /// Waits until the visible text of the first element that `css` selects contains `part`.
    ///
    /// # Panics
    ///
    /// When it does not contain `part` in time.
    pub async fn wait_until_text(&self, css: &str, part: &str) {
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

    /// Clicks on the first element that `css` selects, as soon as it can be clicked on.
    ///
    /// # Panics
    ///
    /// When it cannot be clicked on in time.
    pub async fn click(&self, css: &str) {
        eventually(&format!("a click on {css}"), async || {
            let found = self.client.find(Locator::Css(css)).await.ok()?;
            found.click().await.ok()
        })
        .await;
    }

    /// Types `text` into the element that has the focus.
    ///
    /// # Panics
    ///
    /// When the browser refuses the input.
    pub async fn type_text(&self, text: &str) {
        let mut keys = KeyActions::new("keyboard".to_owned());
        for value in text.chars() {
            keys = keys.then(KeyAction::Down { value }).then(KeyAction::Up { value });
        }
        self.client.perform_actions(keys).await.expect("typed");
    }

    /// Presses a key.
    pub async fn press(&self, key: Key) {
        self.type_text(&char::from(key).to_string()).await;
    }

    /// Presses the Tab key until an element that `css` selects has the focus.
    ///
    /// # Panics
    ///
    /// When no such element has the focus after 200 presses.
    pub async fn tab_to(&self, css: &str) {
        let has_focus = format!("return document.activeElement.matches({})", Value::from(css));
        for _ in 0..200 {
            if self.run_script(&has_focus).await == Value::Bool(true) {
                return;
            }
            self.press(Key::Tab).await;
        }
        panic!("the Tab key does not reach {css}");
    }

    /// The messages in the browser's console since the last call.
    pub async fn take_console_messages(&self) -> Vec<String> {
        let log = self.run_chrome_command("se/log", json!({ "type": "browser" })).await;
        let lines = log.as_array().map(Vec::as_slice).unwrap_or_default();
        lines.iter().map(|line| line["message"].to_string()).collect()
    }

    /// Writes a screenshot of the whole page into `file`, as PNG.
    ///
    /// # Panics
    ///
    /// When the file cannot be written.
    pub async fn write_screenshot(&self, file: &Path) {
        self.run_script("scrollTo(0, 0)").await;
        let size = self.run_script("return [innerWidth, document.documentElement.scrollHeight]").await;
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let parameters = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let picture = self.run_devtools_command("Page.captureScreenshot", parameters).await;
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
        // Deleting the session ends the browser, which is in another process group than the driver.
        let _ = ureq::delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
