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
pub struct PreciseTimer(AsyncFd<OwnedFd>);

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
        Ok(Self(timer))
    }

    /// Waits until `at`; not at all if it has passed. Cancel-safe.
    pub async fn sleep_until(&mut self, at: Instant) {
        let left = at.saturating_duration_since(Instant::now());
        // A timer that is set to zero never ends.
        if left.is_zero() || self.set(left).is_err() {
            return;
        }
        while let Ok(mut ready) = self.0.readable().await {
            let mut expirations = [0_u8; 8];
            match ready.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut expirations)?)) {
                // What was ready was the timer before it was set.
                Err(_) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                Ok(_) => return,
            }
        }
    }

    fn set(&self, after: Duration) -> std::io::Result<()> {
        let it_value = Timespec::try_from(after).map_err(std::io::Error::other)?;
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
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
        for (given_up, wanted) in [(1, 3), (0, 2), (500, 1)] {
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
    async fn a_time_that_has_passed_is_not_waited_for() {
        let mut timer = PreciseTimer::new().expect("a timer");
        assert!(timer.sleep_until(Instant::now()).now_or_never().is_some());
    }
}
