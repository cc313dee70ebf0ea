//! The state of the connection that publishes: its channels, the batches on them, and the bytes that wait to be written.
//! Takes frames that arrived and batches to publish, and says what to write and how each batch ended. No I/O.
//!
//! Must never let two batches share a channel at a time, nor use a channel again on which a message has no answer (a late answer
//! could be taken for that of another message) or a nack: while a queue elects a leader, RabbitMQ 3.10 refuses what a new channel
//! publishes to it, and goes on refusing on that channel when there is a leader.

use std::collections::{BTreeMap, VecDeque};

use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, gen_frame};
use amq_protocol::protocol::constants::REPLY_SUCCESS;
use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
use lapin::BasicProperties;
use lapin::types::AMQPValue;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use crate::broker::publishing::confirms::Confirms;
use crate::broker::publishing::error::{PublishError, closed_connection};
use crate::broker::publishing::frames::write_message;
use crate::model::message::{ID, Message};

/// How a batch ended: the confirms until then, and why no more came.
pub(in crate::broker) type BatchEnd = (Confirms, Option<PublishError>);

/// What RabbitMQ says about the whole connection.
#[derive(Clone, Debug, Default)]
pub(in crate::broker) struct Status {
    /// RabbitMQ takes no messages, with its reason.
    pub(in crate::broker) blocked: Option<String>,
    /// The connection has ended.
    pub(in crate::broker) ended: Option<PublishError>,
}

/// The state.
#[derive(Debug)]
pub(super) struct Session {
    max_frame_bytes: usize,
    max_channels: u16,
    /// By the number of the channel.
    channels: BTreeMap<u16, ChannelState>,
    outgoing: VecDeque<Outgoing>,
    pub(super) status: Status,
}

/// Bytes to write.
#[derive(Debug)]
struct Outgoing {
    /// The channel of the batch that they publish, if they do.
    batch: Option<u16>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
enum ChannelState {
    /// No batch is on it. RabbitMQ gives the next message this number.
    Idle {
        next_number: u64,
    },
    Busy(Batch),
    /// We have closed it, and RabbitMQ has not answered.
    Closing,
}

#[derive(Debug)]
struct Batch {
    confirms: Confirms,
    first_number: u64,
    next_number: u64,
    /// Why RabbitMQ returned the message whose header comes next.
    returned: Option<String>,
    done: oneshot::Sender<BatchEnd>,
}

impl Session {
    /// A session that may have `max_channels` channels.
    pub(super) fn new(max_frame_bytes: usize, max_channels: u16) -> Self {
        let (channels, outgoing) = (BTreeMap::new(), VecDeque::new());
        Self { max_frame_bytes, max_channels, channels, outgoing, status: Status::default() }
    }

    /// Begins to publish a batch, and returns its channel. Its end comes through the receiver.
    ///
    /// # Errors
    ///
    /// When the connection has ended, or has no free channel.
    pub(super) fn publish(
        &mut self,
        exchange: &str,
        messages: &[Message],
    ) -> Result<(u16, oneshot::Receiver<BatchEnd>), PublishError> {
        if let Some(error) = &self.status.ended {
            return Err(error.clone());
        }
        let mut bytes = Vec::with_capacity(messages.iter().map(|message| message.body.len() + 1024).sum());
        let idle = self.channels.iter().find_map(|(number, state)| match state {
            ChannelState::Idle { next_number } => Some((*number, *next_number)),
            _ => None,
        });
        let (channel, first) = match idle {
            Some(idle) => idle,
            None => (self.open_channel(&mut bytes)?, 1),
        };
        for message in messages {
            write_message(&mut bytes, channel, exchange, message, self.max_frame_bytes);
        }
        self.outgoing.push_back(Outgoing { batch: Some(channel), bytes });
        let (done, end) = oneshot::channel();
        let confirms = Confirms::new(first, messages.iter().map(|message| message.id));
        let next_number = first + messages.len() as u64;
        let batch = Batch { confirms, first_number: first, next_number, returned: None, done };
        self.channels.insert(channel, ChannelState::Busy(batch));
        Ok((channel, end))
    }

    /// Appends what opens a channel in confirm mode. RabbitMQ handles the frames of a channel in order, so the messages can
    /// follow without a wait for its answers.
    fn open_channel(&self, bytes: &mut Vec<u8>) -> Result<u16, PublishError> {
        let free = (1..=self.max_channels).find(|number| !self.channels.contains_key(number));
        let number = free.ok_or_else(|| PublishError::protocol("all channels of the connection are in use"))?;
        write(bytes, number, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
        write(bytes, number, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true })));
        Ok(number)
    }

    /// Gives up a batch whose answers take too long, and returns what is known.
    pub(super) fn abandon(&mut self, channel: u16) -> Option<Confirms> {
        let Some(ChannelState::Busy(batch)) = self.channels.get(&channel) else { return None };
        let first_number = batch.first_number;
        let waiting = self.outgoing.len();
        self.outgoing.retain(|outgoing| outgoing.batch != Some(channel));
        let is_unwritten = self.outgoing.len() < waiting;
        let next = match first_number {
            _ if !is_unwritten => Some(ChannelState::Closing),
            // Not even the request to open it was written.
            1 => None,
            next_number => Some(ChannelState::Idle { next_number }),
        };
        if !is_unwritten {
            self.send(channel, AMQPClass::Channel(channel::AMQPMethod::Close(channel_close())));
        }
        let batch = self.channels.remove(&channel);
        self.channels.extend(next.map(|state| (channel, state)));
        match batch {
            Some(ChannelState::Busy(batch)) => Some(batch.confirms),
            _ => None,
        }
    }

    /// Handles a frame that arrived at `now`.
    ///
    /// # Errors
    ///
    /// When the connection ends with it.
    pub(super) fn handle(&mut self, frame: AMQPFrame, now: Instant) -> Result<(), PublishError> {
        use basic::AMQPMethod::{Ack, Nack, Return};
        use connection::AMQPMethod::{Blocked, Close, CloseOk, Unblocked};
        match frame {
            AMQPFrame::Method(channel, AMQPClass::Basic(Ack(ack))) => {
                self.answer(channel, ack.delivery_tag, ack.multiple, Some(now))
            }
            AMQPFrame::Method(channel, AMQPClass::Basic(Nack(nack))) => {
                self.answer(channel, nack.delivery_tag, nack.multiple, None)
            }
            AMQPFrame::Method(channel, AMQPClass::Basic(Return(returned))) => {
                let basic::Return { reply_code, reply_text, routing_key, .. } = returned;
                let key = routing_key.as_str();
                let why = format!("no queue took the message with routing key {key:?} ({reply_code} {reply_text})");
                self.with_batch(channel, |batch| batch.returned = Some(why));
                Ok(())
            }
            AMQPFrame::Header(channel, AMQPContentHeader { properties, .. }) => {
                let id = row_id(&properties);
                self.with_batch(channel, |batch| {
                    if let (Some(id), Some(why)) = (id, batch.returned.take()) {
                        batch.confirms.note_return(id, why);
                    }
                });
                Ok(())
            }
            // The body of a returned message.
            AMQPFrame::Body(..) | AMQPFrame::Heartbeat => Ok(()),
            AMQPFrame::Method(channel, AMQPClass::Channel(method)) => {
                self.handle_channel_method(channel, method);
                Ok(())
            }
            AMQPFrame::Method(0, AMQPClass::Connection(Blocked(blocked))) => {
                self.status.blocked = Some(blocked.reason.to_string());
                Ok(())
            }
            AMQPFrame::Method(0, AMQPClass::Connection(Unblocked(_))) => {
                self.status.blocked = None;
                Ok(())
            }
            AMQPFrame::Method(0, AMQPClass::Connection(Close(close))) => Err(closed_connection(&close)),
            AMQPFrame::Method(0, AMQPClass::Connection(CloseOk(_))) => Err(PublishError::Closed),
            other => Err(PublishError::protocol(format!("an unexpected frame: {other}"))),
        }
    }

    fn handle_channel_method(&mut self, number: u16, method: channel::AMQPMethod) {
        match method {
            channel::AMQPMethod::Close(close) => {
                self.send(number, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})));
                let text = close.reply_text.to_string();
                // If we have closed it as well, RabbitMQ still answers that.
                if !matches!(self.channels.get(&number), Some(ChannelState::Closing)) {
                    self.end_channel(number, &PublishError::ChannelClosed { code: close.reply_code, text });
                }
            }
            channel::AMQPMethod::CloseOk(_) => drop(self.channels.remove(&number)),
            channel::AMQPMethod::Flow(flow) => {
                let answer = channel::FlowOk { active: flow.active };
                self.send(number, AMQPClass::Channel(channel::AMQPMethod::FlowOk(answer)));
            }
            // The channel is open: its messages follow without a wait for this.
            _ => {}
        }
    }

    fn answer(
        &mut self,
        channel: u16,
        number: u64,
        multiple: bool,
        acked_at: Option<Instant>,
    ) -> Result<(), PublishError> {
        let mut known = true;
        let is_complete = self.with_batch(channel, |batch| {
            known = batch.confirms.answer(number, multiple, acked_at);
            batch.confirms.is_complete()
        });
        if !known {
            return Err(PublishError::protocol(format!(
                "a confirm of message {number}, which channel {channel} does not have"
            )));
        }
        if is_complete == Some(true)
            && let Some(ChannelState::Busy(batch)) = self.channels.remove(&channel)
        {
            if batch.confirms.has_nack() {
                self.send(channel, AMQPClass::Channel(channel::AMQPMethod::Close(channel_close())));
                self.channels.insert(channel, ChannelState::Closing);
            } else {
                self.channels.insert(channel, ChannelState::Idle { next_number: batch.next_number });
            }
            // If nobody waits any more, the rows stay due.
            let _ = batch.done.send((batch.confirms, None));
        }
        Ok(())
    }

    /// The batch on a channel. There is none on a channel that we have closed.
    fn with_batch<T>(&mut self, channel: u16, work: impl FnOnce(&mut Batch) -> T) -> Option<T> {
        match self.channels.get_mut(&channel) {
            Some(ChannelState::Busy(batch)) => Some(work(batch)),
            _ => None,
        }
    }

    /// Ends a channel, and the batch on it.
    fn end_channel(&mut self, number: u16, error: &PublishError) {
        if let Some(ChannelState::Busy(batch)) = self.channels.remove(&number) {
            let _ = batch.done.send((batch.confirms, Some(error.clone())));
        }
    }

    /// Ends the connection, and all batches on it.
    pub(super) fn end(&mut self, error: &PublishError) {
        if self.status.ended.is_none() {
            self.status.ended = Some(error.clone());
        }
        for number in self.channels.keys().copied().collect::<Vec<_>>() {
            self.end_channel(number, error);
        }
        self.outgoing.clear();
    }

    /// Asks RabbitMQ to close the connection. Its answer ends the session.
    pub(super) fn close(&mut self) {
        let close =
            connection::Close { reply_code: REPLY_SUCCESS, reply_text: "good-bye".into(), class_id: 0, method_id: 0 };
        self.send(0, AMQPClass::Connection(connection::AMQPMethod::Close(close)));
    }

    /// Appends a heartbeat, unless something else waits to be written.
    pub(super) fn send_heartbeat(&mut self) {
        if self.outgoing.is_empty() {
            let mut bytes = Vec::new();
            write_frame(&mut bytes, &AMQPFrame::Heartbeat);
            self.outgoing.push_back(Outgoing { batch: None, bytes });
        }
    }

    /// The bytes to write next. While RabbitMQ blocks the connection, they wait: it would not read them.
    pub(super) fn next_outgoing(&mut self) -> Option<Vec<u8>> {
        if self.status.blocked.is_some() {
            return None;
        }
        self.outgoing.pop_front().map(|outgoing| outgoing.bytes)
    }

    fn send(&mut self, channel: u16, method: AMQPClass) {
        let mut bytes = Vec::new();
        write(&mut bytes, channel, method);
        self.outgoing.push_back(Outgoing { batch: None, bytes });
    }
}

/// The id of the row whose message was returned. A relayed message has a `message_id` of its own.
fn row_id(properties: &BasicProperties) -> Option<Uuid> {
    let own = properties.headers().as_ref().and_then(|headers| headers.inner().get(ID));
    match own {
        Some(AMQPValue::LongString(id)) => Uuid::try_parse_ascii(id.as_bytes()).ok(),
        _ => properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok()),
    }
}

fn channel_close() -> channel::Close {
    channel::Close { reply_code: REPLY_SUCCESS, reply_text: "not used again".into(), class_id: 0, method_id: 0 }
}

/// Appends a method's frame.
pub(super) fn write(bytes: &mut Vec<u8>, channel: u16, method: AMQPClass) {
    write_frame(bytes, &AMQPFrame::Method(channel, method));
}

/// Appends a frame.
pub(super) fn write_frame(bytes: &mut Vec<u8>, frame: &AMQPFrame) {
    let written = gen_frame(frame)(Vec::new().into()).expect("memory takes everything");
    bytes.extend(written.into_inner().0);
}

#[cfg(test)]
mod tests;
