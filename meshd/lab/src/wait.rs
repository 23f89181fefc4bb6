//! Waiting for a condition with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks `probe` again and again until it returns a value.
///
/// The pause between two questions grows from 1 ms to 50 ms.
///
/// # Errors
/// When `timeout` has passed: what was waited for, and the last error if the probe told one. A probe
/// that says `Ok(None)` only means "not yet".
pub fn poll_until_some<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= timeout {
            let waited = format!("{what}: not within {:.1} s", timeout.as_secs_f64());
            match last {
                Some(error) => return Err(error.context(waited)),
                None => bail!(waited),
            }
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Asks `condition` again and again until it holds.
///
/// # Errors
/// When it does not hold within `timeout`.
pub fn poll_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    poll_until_some(what, timeout, || Ok(condition().then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_and_the_aim_are_told() {
        let error = poll_until_some::<()>("the moon", Duration::from_millis(5), || bail!("it is cheese"))
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("the moon") && text.contains("cheese"), "{text}");
        assert!(poll_until("never", Duration::from_millis(5), || false).is_err());
    }

    #[test]
    fn a_value_ends_the_wait() {
        let mut left = 3;
        let value = poll_until_some("countdown", Duration::from_secs(5), || {
            left -= 1;
            Ok((left == 0).then_some(7))
        });
        assert_eq!(value.unwrap(), 7);
    }
}
