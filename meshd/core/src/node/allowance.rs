//! How often something may be done.

use std::time::Duration;

use crate::time::Time;

/// So many in a second, and those of seconds before, up to a limit.
#[derive(Debug)]
pub(super) struct Allowance<const A_SECOND: u32, const AT_MOST: u32> {
    /// Less than nothing when more was taken than there was.
    left: i64,
    at: Time,
}

impl<const A_SECOND: u32, const AT_MOST: u32> Default for Allowance<A_SECOND, AT_MOST> {
    fn default() -> Self {
        Self { left: AT_MOST.into(), at: Time::ZERO }
    }
}

impl<const A_SECOND: u32, const AT_MOST: u32> Allowance<A_SECOND, AT_MOST> {
    /// Whether there is one left.
    pub(super) fn has_one(&mut self, now: Time) -> bool {
        let each = Duration::from_secs(1) / A_SECOND;
        let more = u32::try_from(now.since(self.at).as_micros() / each.as_micros()).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more.into()).min(AT_MOST.into());
        self.at = self.at + each.saturating_mul(more);
        self.left > 0
    }

    /// Takes some. What is taken beyond the last one is missing later.
    pub(super) fn take(&mut self, count: u32) {
        self.left = self.left.saturating_sub(count.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_filled_up_again_as_time_goes_by() {
        let mut allowance = Allowance::<10, 30>::default();
        let mut now = Time::ZERO + Duration::from_secs(1);
        let mut taken = 0;
        for _ in 0..100 {
            now = now + Duration::from_millis(70);
            while allowance.has_one(now) {
                allowance.take(1);
                taken += 1;
            }
        }
        assert_eq!(taken, 30 + 70);
        allowance.has_one(now + 1000 * Duration::from_secs(1));
        assert_eq!(allowance.left, 30);
    }

    #[test]
    fn who_takes_several_at_a_time_gets_no_more_than_others() {
        let mut allowance = Allowance::<10, 30>::default();
        let mut now = Time::ZERO + Duration::from_secs(1);
        let mut taken = 0;
        for _ in 0..1000 {
            now = now + Duration::from_millis(100);
            if allowance.has_one(now) {
                allowance.take(7);
                taken += 7;
            }
        }
        assert!((1023..=1037).contains(&taken), "{taken}");
    }
}
