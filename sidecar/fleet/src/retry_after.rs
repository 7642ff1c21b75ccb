//! When somebody who is asked too often wants to be asked again: in so many seconds, or at a date.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use axum::http::header::{DATE, HeaderValue, RETRY_AFTER};

/// What is longer is taken for a slip: who still means it then says it again.
const MOST: Duration = Duration::from_secs(24 * 3600);

/// `None`: nothing is said, or nothing that means anything. At once, if its date is past.
pub(crate) fn of(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    // Of several limits, some have one each: `retry-after-create`.
    let any = || headers.iter().find(|(name, _)| name.as_str().starts_with("retry-after")).map(|(_, value)| value);
    let said = headers.get(RETRY_AFTER).or_else(any)?.to_str().ok()?.trim();
    let after = if !said.is_empty() && said.bytes().all(|byte| byte.is_ascii_digit()) {
        said.parse().map_or(MOST, Duration::from_secs)
    } else {
        let at = httpdate::parse_http_date(said).ok()?;
        // By their own clock, where they tell what it shows: ours may be another.
        at.duration_since(headers.get(DATE).and_then(date).unwrap_or(now)).unwrap_or_default()
    };
    Some(after.min(MOST))
}

fn date(value: &HeaderValue) -> Option<SystemTime> {
    httpdate::parse_http_date(value.to_str().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_dates_are_understood_and_bounded() {
        // 1994-11-06 08:49:37, of which the standard makes its examples.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let after = |headers: &[(&'static str, &str)]| {
            let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            of(&headers, now).map(|after| after.as_secs())
        };
        for (said, seconds) in [
            ("7", Some(7)),
            (" 120 ", Some(120)),
            ("0", Some(0)),
            ("99999999", Some(MOST.as_secs())),
            ("99999999999999999999999999", Some(MOST.as_secs())),
            ("Sun, 06 Nov 1994 08:49:44 GMT", Some(7)),
            ("Sunday, 06-Nov-94 08:49:44 GMT", Some(7)),
            ("Sun Nov  6 08:49:44 1994", Some(7)),
            // It is over: at once.
            ("Sun, 06 Nov 1994 08:49:30 GMT", Some(0)),
            ("Sat, 06 Nov 2094 08:49:44 GMT", Some(MOST.as_secs())),
            ("", None),
            ("-1", None),
            ("soon", None),
            ("Sun, 36 Nov 1994 08:49:44 GMT", None),
        ] {
            assert_eq!(after(&[("retry-after", said)]), seconds, "{said}");
        }
        assert_eq!(after(&[]), None);
        assert_eq!(after(&[("retry-after-create", "3")]), Some(3));
        assert_eq!(after(&[("retry-after-create", "3"), ("retry-after", "4")]), Some(4));
        // Their clock is an hour ahead of ours, and a minute is meant.
        let theirs = [("date", "Sun, 06 Nov 1994 09:49:37 GMT"), ("retry-after", "Sun, 06 Nov 1994 09:50:37 GMT")];
        assert_eq!(after(&theirs), Some(60));
    }
}
