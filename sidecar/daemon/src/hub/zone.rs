//! Where the days and months of budgets begin: at midnight there, whatever the clocks do in the night. The rules of all zones are in
//! the binary.

use std::ops::Range;
use std::time::Duration;

use agent_sidecar_core::budget::Periods;
use jiff::civil::Date;
use jiff::tz::{Offset, TimeZone};
use jiff::{Timestamp, ZonedDateTime};

/// See the module's head.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Zone(TimeZone);

impl Default for Zone {
    fn default() -> Zone {
        Zone(TimeZone::UTC)
    }
}

impl Zone {
    /// `Europe/Berlin`, `UTC`, `+05:30`.
    pub(crate) fn of(text: &str) -> Option<Zone> {
        match offset(text) {
            Some(seconds) => Some(Zone(TimeZone::fixed(Offset::from_seconds(seconds).ok()?))),
            // Lookups do not care for capitals; who reads the configuration does.
            None => TimeZone::get(text).ok().filter(|zone| zone.iana_name() == Some(text)).map(Zone),
        }
    }

    /// The day on the calendar there.
    pub(crate) fn day(&self, second: i64) -> Day {
        let now = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH).to_zoned_datetime(self.0.clone());
        let begins = |date: Result<Date, jiff::Error>| {
            let start = date.and_then(|date| date.to_zoned_datetime(self.0.clone())).and_then(|day| day.start_of_day());
            start.map_or(i64::MAX, |start| start.timestamp().as_second())
        };
        let date = now.date();
        let days = date.duration_since(Date::constant(1970, 1, 1)).as_hours() / 24;
        Day {
            number: u32::try_from(days).unwrap_or_default(),
            hours: begins(Ok(date))..begins(date.tomorrow()),
            month: begins(Ok(date.first_of_month()))..begins(date.last_of_month().tomorrow()),
        }
    }

    /// When a day begins there: `2026-11-23`.
    pub(crate) fn midnight(&self, date: &str) -> Option<i64> {
        let start = date.parse::<Date>().ok()?.to_zoned_datetime(self.0.clone()).and_then(|day| day.start_of_day()).ok()?;
        Some(start.timestamp().as_second())
    }

    /// The day and the month that it is then.
    pub(crate) fn periods(&self, unix: Duration) -> Periods {
        let second = i64::try_from(unix.as_secs()).unwrap_or(i64::MAX);
        let now = Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH).to_zoned_datetime(self.0.clone());
        let midnight_after = |day: Result<ZonedDateTime, jiff::Error>| {
            let next = day.and_then(|day| day.tomorrow()).and_then(|day| day.start_of_day());
            let seconds = next.ok().and_then(|next| u64::try_from(next.timestamp().as_second()).ok());
            // At the end of all times.
            Duration::from_secs(seconds.unwrap_or(u64::MAX))
        };
        let date = now.date();
        let day = format!("{:04}-{:02}-{:02}", date.year(), date.month(), date.day());
        Periods::new(day, midnight_after(Ok(now.clone())), midnight_after(now.last_of_month()))
    }
}

/// A day there, and the month that it is in: each from its beginning to the beginning of the next, in seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Day {
    /// Tells days apart, in their order.
    pub(crate) number: u32,
    pub(crate) hours: Range<i64>,
    pub(crate) month: Range<i64>,
}

/// `UTC`, `+02:00`, `-05:30`.
fn offset(text: &str) -> Option<i32> {
    if matches!(text, "UTC" | "Z") {
        return Some(0);
    }
    let (sign, rest) = text.strip_prefix('+').map(|rest| (1, rest)).or_else(|| text.strip_prefix('-').map(|rest| (-1, rest)))?;
    let (hours, minutes) = rest.split_once(':')?;
    let number = |text: &str, most: i32| {
        let two = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<i32>().ok().filter(|n| two && *n <= most)
    };
    Some(sign * (number(hours, 14)? * 3_600 + number(minutes, 59)? * 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600;
    /// Midnight of 2026-11-23 in Greenwich.
    const DAY: u64 = 1_795_392_000;

    /// The day that it is, and how long it and its month go on from there, in hours.
    fn at(zone: &str, unix: u64) -> (String, u64, u64) {
        let periods = Zone::of(zone).unwrap().periods(Duration::from_secs(unix));
        let (day, ends, month_ends) = periods.parts();
        (day.to_owned(), (ends.as_secs() - unix) / HOUR, (month_ends.as_secs() - unix) / HOUR)
    }

    #[test]
    fn a_day_ends_where_the_bill_is_made() {
        let noon = DAY + 12 * HOUR;
        assert_eq!(at("UTC", noon), (String::from("2026-11-23"), 12, 12 + 7 * 24));
        assert_eq!(at("+13:00", noon), (String::from("2026-11-24"), 23, 23 + 6 * 24));
        assert_eq!(at("-13:00", noon), (String::from("2026-11-22"), 1, 1 + 8 * 24));
        assert_eq!(at("Asia/Kolkata", DAY), at("+05:30", DAY));
        assert_eq!(at("America/New_York", DAY).0, "2026-11-22");
    }

    #[test]
    fn days_have_23_and_25_hours_where_the_clocks_are_changed() {
        // Sundays in Berlin, from their midnights on.
        assert_eq!(at("Europe/Berlin", 1_774_738_800), (String::from("2026-03-29"), 23, 23 + 2 * 24));
        assert_eq!(at("Europe/Berlin", 1_792_879_200), (String::from("2026-10-25"), 25, 25 + 6 * 24));
        // In Chile there is no midnight then: the day begins at one.
        let (day, left, _) = at("America/Santiago", 1_788_661_800);
        assert_eq!((day.as_str(), left), ("2026-09-05", 1));
        assert_eq!(at("America/Santiago", 1_788_661_800 + 2 * HOUR).0, "2026-09-06");
    }

    #[test]
    fn days_of_a_bill_follow_each_other_without_a_gap() {
        for zone in ["UTC", "Europe/Berlin", "America/Santiago", "Pacific/Apia", "-05:30"] {
            let zone = Zone::of(zone).unwrap();
            let mut day = zone.day(1_766_000_000);
            for _ in 0..400 {
                let next = zone.day(day.hours.end);
                assert_eq!((next.number, next.hours.start), (day.number + 1, day.hours.end), "{zone:?}");
                assert_eq!(zone.day(next.hours.end - 1), next);
                assert!(next.month == day.month || next.month.start == day.month.end, "{zone:?}");
                assert!(next.month.start <= next.hours.start && next.hours.end <= next.month.end);
                day = next;
            }
        }
        assert_eq!(Zone::of("Europe/Berlin").unwrap().midnight("2026-11-23"), Some(i64::try_from(DAY).unwrap() - 3_600));
    }

    #[test]
    fn what_is_no_zone_is_none() {
        for text in ["", "Berlin", "CEST", "europe/berlin", "+2", "+15:00", "+02:60", "02:00", "Europe/Berlin ", "UTC+2"] {
            assert_eq!(Zone::of(text), None, "{text}");
        }
        for text in ["UTC", "Z", "Etc/UTC", "+00:00", "-05:30", "Pacific/Apia"] {
            assert!(Zone::of(text).is_some(), "{text}");
        }
    }
}
