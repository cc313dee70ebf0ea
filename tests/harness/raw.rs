//! Publishes messages with arbitrary bytes as headers, which no client library would send, by writing frames of AMQP
//! 0-9-1 directly.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// A connection with one channel in confirm mode.
#[derive(Debug)]
pub struct RawPublisher {
    stream: TcpStream,
}

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;

impl RawPublisher {
    /// Connects as the user `guest`.
    ///
    /// # Panics
    ///
    /// When RabbitMQ refuses the connection.
    #[must_use]
    pub fn connect(port: u16, vhost: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("RabbitMQ is there");
        let mut publisher = Self { stream };
        publisher.write(b"AMQP\0\0\x09\x01");
        publisher.expect(10, 10);
        let login = [long(b""), short(b"PLAIN"), long(b"\0guest\0guest"), short(b"en_US")].concat();
        publisher.method(0, 10, 11, &login);
        publisher.expect(10, 30);
        publisher.method(0, 10, 31, &[10_u16.to_be_bytes().as_slice(), &131_072_u32.to_be_bytes(), &[0, 0]].concat());
        publisher.method(0, 10, 40, &[short(vhost.as_bytes()), short(b""), vec![0]].concat());
        publisher.expect(10, 41);
        publisher.method(1, 20, 10, &short(b""));
        publisher.expect(20, 11);
        publisher.method(1, 85, 10, &[0]);
        publisher.expect(85, 11);
        publisher
    }

    /// Publishes `body` to a queue, with these encoded headers, and waits for the confirm.
    ///
    /// # Panics
    ///
    /// When RabbitMQ closes the connection or the channel.
    pub fn publish(&mut self, queue: &str, headers: &[u8], body: &[u8]) {
        self.method(1, 60, 40, &[vec![0, 0], short(b""), short(queue.as_bytes()), vec![0]].concat());
        let has_headers: u16 = 1 << 13;
        let length = (body.len() as u64).to_be_bytes();
        let properties =
            [&60_u16.to_be_bytes()[..], &[0, 0], &length, &has_headers.to_be_bytes(), &long(headers)].concat();
        self.frame(HEADER, 1, &properties);
        self.frame(BODY, 1, body);
        self.expect(60, 80);
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        self.frame(METHOD, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat());
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
        self.write(&[&[kind][..], &channel.to_be_bytes(), &length, payload, &[0xCE]].concat());
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("RabbitMQ reads");
    }

    /// Reads frames until the given method arrives.
    fn expect(&mut self, class: u16, method: u16) {
        loop {
            let mut start = [0; 7];
            self.stream.read_exact(&mut start).expect("RabbitMQ answers");
            let length = u32::from_be_bytes([start[3], start[4], start[5], start[6]]);
            let mut payload = vec![0; length as usize + 1];
            self.stream.read_exact(&mut payload).expect("RabbitMQ goes on");
            if start[0] != METHOD {
                continue;
            }
            let got = (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]));
            let text = String::from_utf8_lossy(&payload[4..]);
            assert!(!matches!(got, (10, 50) | (20, 40)), "RabbitMQ closed: {text}");
            if got == (class, method) {
                return;
            }
        }
    }
}

/// Encodes a short string.
///
/// # Panics
///
/// When `bytes` has more than 255 bytes.
#[must_use]
pub fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).expect("a short string")][..], bytes].concat()
}

/// Encodes a long string, a table or an array.
///
/// # Panics
///
/// When `bytes` has 4 GiB or more.
#[must_use]
pub fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).expect("shorter").to_be_bytes()[..], bytes].concat()
}

/// Encodes the header `name` with a value of the type `kind`.
#[must_use]
pub fn header(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(name)[..], &[kind], value].concat()
}

/// Encodes a header whose value is `depth` nested arrays.
#[must_use]
pub fn nested(name: &[u8], depth: usize) -> Vec<u8> {
    let mut value = Vec::new();
    for _ in 0..depth {
        value = [&b"A"[..], &long(&value)].concat();
    }
    [&short(name)[..], &value].concat()
}
