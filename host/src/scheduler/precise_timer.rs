//! A timer that is precise to a tenth of a millisecond; tokio's is precise to a millisecond. Linux wakes the daemon's thread
//! by a descriptor, so that no other thread is needed. Must never be used by two tasks at a time.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// The timer.
#[derive(Debug)]
pub struct PreciseTimer {
    descriptor: AsyncFd<OwnedFd>,
    /// For when it is set. Often the loop wakes and goes on sleeping until the same moment.
    set_for: Option<Instant>,
}

impl PreciseTimer {
    /// Makes a timer, inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the process may not open another descriptor.
    pub fn new() -> std::io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        // SAFETY: the descriptor is open, and is closed only when the timer is dropped.
        #[expect(unsafe_code, reason = "tokio cannot tell whether a descriptor stays open")]
        let timer = unsafe { AsyncFd::register(timer)? };
        Ok(Self { descriptor: timer, set_for: None })
    }

    /// Waits until `at`; not at all if it has passed. Cancel-safe.
    pub async fn sleep_until(&mut self, at: Instant) {
        if self.try_sleep_until(at).await.is_err() {
            tokio::time::sleep_until(at).await;
        }
    }

    async fn try_sleep_until(&mut self, at: Instant) -> std::io::Result<()> {
        let left = at.saturating_duration_since(Instant::now());
        // A timer that is set to zero never ends.
        if left.is_zero() {
            return Ok(());
        }
        if self.set_for != Some(at) {
            self.set_for = None;
            self.set(left)?;
            self.set_for = Some(at);
        }
        loop {
            let mut ready = self.descriptor.readable().await?;
            let mut expirations = [0_u8; 8];
            match ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut expirations)?)) {
                // What was ready was the timer before it was set.
                Err(_) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                Ok(read) => {
                    self.set_for = None;
                    return read.map(drop);
                }
            }
        }
    }

    fn set(&self, after: Duration) -> std::io::Result<()> {
        let it_value = Timespec::try_from(after).map_err(std::io::Error::other)?;
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(self.descriptor.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_sleep_ends_after_its_time_also_when_another_was_given_up() {
        let mut timer = PreciseTimer::new().expect("a timer");
        for (given_up, wanted) in [(1, 3), (0, 2), (500, 1), (500, 1)] {
            let given_up = Duration::from_millis(given_up);
            assert!(timer.sleep_until(Instant::now() + given_up).now_or_never().is_none() || given_up.is_zero());
            // The timer that was given up may end meanwhile.
            tokio::time::sleep(Duration::from_millis(2)).await;
            let wanted = Instant::now() + Duration::from_millis(wanted);
            timer.sleep_until(wanted).await;
            assert!(Instant::now() >= wanted);
        }
    }

    #[tokio::test]
    async fn a_sleep_can_go_on_until_the_same_time() {
        let mut timer = PreciseTimer::new().expect("a timer");
        let wanted = Instant::now() + Duration::from_millis(5);
        for _ in 0..3 {
            assert!(timer.sleep_until(wanted).now_or_never().is_none());
        }
        timer.sleep_until(wanted).await;
        assert!(Instant::now() >= wanted);
        // Longer than the timer that was given up: it may have ended meanwhile, and must not end the next one.
        let wanted = Instant::now() + Duration::from_millis(1);
        assert!(timer.sleep_until(wanted).now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(4)).await;
        assert!(timer.sleep_until(wanted).now_or_never().is_some(), "it has passed");
        let wanted = Instant::now() + Duration::from_millis(3);
        timer.sleep_until(wanted).await;
        assert!(Instant::now() >= wanted);
    }

    #[tokio::test]
    async fn a_time_that_has_passed_is_not_waited_for() {
        let mut timer = PreciseTimer::new().expect("a timer");
        assert!(timer.sleep_until(Instant::now()).now_or_never().is_some());
    }
}
