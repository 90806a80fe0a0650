//! `Rfc3339`: times of day as text, for the status and the log. No deadline depends on them.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::time::{ClockId, clock_gettime};

/// A time that is shown in RFC 3339, in UTC, to the millisecond: `2026-11-23T17:14:22.123Z`. A time before 1970 is
/// shown as 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rfc3339(pub SystemTime);

impl Rfc3339 {
    /// Returns the time of day.
    pub fn now() -> Self {
        Self(SystemTime::now())
    }

    /// Returns the time that is later by `elapsed`.
    pub(crate) fn after(self, elapsed: Duration) -> Self {
        Self(self.0 + elapsed)
    }

    /// Returns the seconds since 1970.
    pub(crate) fn unix_seconds(self) -> f64 {
        self.unix_time().as_secs_f64()
    }

    /// Returns the milliseconds since 1970.
    pub(crate) fn unix_millis(self) -> u64 {
        u64::try_from(self.unix_time().as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns the time of day at that many milliseconds after 1970.
    pub(crate) fn of_unix_millis(millis: u64) -> Self {
        Self::of_unix_time(Duration::from_millis(millis))
    }

    /// Returns the time since 1970.
    pub(crate) fn unix_time(self) -> Duration {
        self.0.duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    /// Returns the time of day at that time after 1970. A time beyond the range of the clock is 1970.
    pub(crate) fn of_unix_time(since: Duration) -> Self {
        Self(UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH))
    }

    /// Returns the time of day at which this host had been up for `uptime`.
    pub(crate) fn of_uptime(uptime: Duration) -> Self {
        let up = Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default();
        Self(SystemTime::now() - up.saturating_sub(uptime))
    }
}

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.unix_time();
        let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        // Years are counted from the 1st of March of the year 0, so that a leap day is the last day of its year; 400
        // years always have 146,097 days.
        let days = days + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let (day, month, january) =
            (day - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1, u64::from(month >= 10));
        let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
        write!(f, "{:04}-{month:02}-{day:02}T", era * 400 + year + january)?;
        write!(f, "{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_known_dates() {
        // Computed with GNU date.
        for (milliseconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599_001, "2024-12-31T23:59:59.001Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (1_795_454_062_123, "2026-11-23T17:14:22.123Z"),
            (4_107_542_399_000, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (253_402_300_799_000, "9999-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(Rfc3339(UNIX_EPOCH + Duration::from_millis(milliseconds)).to_string(), text);
        }
        assert_eq!(
            Rfc3339(UNIX_EPOCH - Duration::from_secs(1)).to_string(),
            "1970-01-01T00:00:00.000Z"
        );
    }

    #[test]
    fn unix_time_is_told_in_seconds() {
        let at = |milliseconds| Rfc3339(UNIX_EPOCH + Duration::from_millis(milliseconds));
        assert!((at(1_795_454_062_123).unix_seconds() - 1_795_454_062.123).abs() < 0.000_5);
        assert!(Rfc3339(UNIX_EPOCH - Duration::from_secs(1)).unix_seconds() < f64::EPSILON);
        let up = Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap();
        let ago = Rfc3339::now().unix_seconds()
            - Rfc3339::of_uptime(up.saturating_sub(Duration::from_secs(100))).unix_seconds();
        assert!(up.as_secs() < 100 || (ago - 100.0).abs() < 10.0, "{ago}");
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut expected = (1970, 1, 1);
        for day in 0..200_000 {
            let (year, month, of_month) = expected;
            let shown = Rfc3339(UNIX_EPOCH + Duration::from_secs(day * 86_400)).to_string();
            assert_eq!(&shown[..10], format!("{year:04}-{month:02}-{of_month:02}"));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 => 28 + i32::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (of_month == length, month) {
                (false, _) => (year, month, of_month + 1),
                (true, 12) => (year + 1, 1, 1),
                (true, _) => (year, month + 1, 1),
            };
        }
    }
}
