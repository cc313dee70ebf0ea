//! The bytes that arrived, and the frames in them. No I/O.

use amq_protocol::frame::{AMQPFrame, parse_frame};

use crate::broker::publishing::error::PublishError;

/// How many bytes are read at once, at most.
const READ_BYTES: usize = 16 * 1024;
/// The bytes of a frame before its payload: its type, channel and size.
const FRAME_START: usize = 7;

/// Bytes that arrived and are not read as frames yet.
#[derive(Debug)]
pub(super) struct Incoming {
    buffer: Vec<u8>,
    /// Where the bytes begin and end in the buffer.
    from: usize,
    to: usize,
    max_frame_bytes: usize,
}

impl Incoming {
    /// A buffer for frames of at most `max_frame_bytes`.
    pub(super) fn new(max_frame_bytes: usize) -> Self {
        Self { buffer: vec![0; READ_BYTES], from: 0, to: 0, max_frame_bytes }
    }

    /// Sets what was agreed on. 0 is no limit.
    pub(super) fn limit(&mut self, max_frame_bytes: usize) {
        self.max_frame_bytes = max_frame_bytes;
    }

    /// Room for further bytes. Frames must be taken out first.
    pub(super) fn space(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        if self.buffer.len() < self.to + READ_BYTES {
            self.buffer.resize(self.to + READ_BYTES, 0);
        }
        &mut self.buffer[self.to..]
    }

    /// Notes that so many bytes were put into the room.
    ///
    /// # Errors
    ///
    /// When there were none: RabbitMQ has closed the connection without a word.
    pub(super) fn filled(&mut self, bytes: usize) -> std::io::Result<()> {
        self.to += bytes;
        if bytes == 0 { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Takes out the next frame; `None` = it has not arrived as a whole.
    ///
    /// # Errors
    ///
    /// When the bytes are no frame, or one that is larger than agreed.
    pub(super) fn next_frame(&mut self) -> Result<Option<AMQPFrame>, PublishError> {
        let bytes = &self.buffer[self.from..self.to];
        let Some(size) = bytes.get(3..FRAME_START) else { return Ok(None) };
        // What begins with an A is a protocol header, which has no size.
        if bytes[0] != b'A' {
            let size = u32::from_be_bytes(size.try_into().expect("four bytes")) as usize;
            if self.max_frame_bytes != 0 && size + FRAME_START + 1 > self.max_frame_bytes {
                return Err(PublishError::protocol(format!("a frame of {size} bytes")));
            }
            if bytes.len() < size + FRAME_START + 1 {
                return Ok(None);
            }
        }
        match parse_frame(bytes) {
            Ok((rest, frame)) => {
                self.from = self.to - rest.len();
                Ok(Some(frame))
            }
            Err(error) if error.is_incomplete() && bytes[0] == b'A' => Ok(None),
            Err(_) => Err(PublishError::protocol("a frame that cannot be read")),
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::protocol::{AMQPClass, basic};
    use proptest::prelude::*;

    use super::*;
    use crate::broker::publishing::session::{write, write_frame};

    fn ack(number: u64) -> AMQPClass {
        AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: number, multiple: true }))
    }

    /// The frames in `bytes`, which arrive in pieces of these sizes again and again.
    fn read(bytes: &[u8], pieces: &[usize], max_frame_bytes: usize) -> Result<Vec<AMQPFrame>, PublishError> {
        let mut incoming = Incoming::new(max_frame_bytes);
        let (mut frames, mut left) = (Vec::new(), bytes);
        for piece in pieces.iter().cycle() {
            while let Some(frame) = incoming.next_frame()? {
                frames.push(frame);
            }
            if left.is_empty() {
                break;
            }
            let space = incoming.space();
            let count = (*piece).min(left.len()).min(space.len());
            space[..count].copy_from_slice(&left[..count]);
            incoming.filled(count).expect("some bytes");
            left = &left[count..];
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn frames_are_read_however_their_bytes_arrive(
            numbers in prop::collection::vec(any::<u64>(), 0..40),
            body in 0..40_000_usize,
            pieces in prop::collection::vec(1..20_000_usize, 1..5),
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for number in numbers {
                write(&mut bytes, 3, ack(number));
                expected.push(AMQPFrame::Method(3, ack(number)));
            }
            expected.extend([AMQPFrame::Body(3, vec![7; body]), AMQPFrame::Heartbeat]);
            write_frame(&mut bytes, &AMQPFrame::Body(3, vec![7; body]));
            write_frame(&mut bytes, &AMQPFrame::Heartbeat);
            prop_assert!(read(&bytes, &pieces, 0).expect("frames") == expected);
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes, &[7], 4096);
        }
    }

    #[test]
    fn a_frame_that_is_larger_than_agreed_is_an_error_at_once() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &AMQPFrame::Body(1, vec![0; 5_000]));
        let error = read(&bytes[..100], &[100], 4096).expect_err("it is too large");
        assert_eq!(error.to_string(), "what RabbitMQ sent is not AMQP 0-9-1: a frame of 5000 bytes");
    }
}
