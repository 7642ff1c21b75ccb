//! When memory will reach its limit, if it goes on as it has: a line through the last ten minutes that neither noise, nor a step, nor
//! a single peak bends.

use std::collections::VecDeque;
use std::time::Duration;

/// Readings that are kept: ten minutes, one each five seconds.
const WINDOW: usize = 120;
/// Fewer tell nothing.
const ENOUGH: usize = 24;
/// Growth below this, or below this share of what is held, is nobody's concern.
const GROWTH_BYTES: f64 = 32.0 * 1024.0 * 1024.0;
const GROWTH_SHARE: f64 = 0.05;
/// The line has to rise this much more than the readings lie beside it.
const SIGNIFICANT: f64 = 4.0;
/// Both halves have to rise, this much of what the whole does: a step is in one of them.
const STEADY: f64 = 0.25;
/// A forecast is withdrawn after so many readings without one, or it would come and go.
const PATIENCE: u32 = 6;

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Growth {
    /// Seconds, bytes.
    readings: VecDeque<(f64, f64)>,
    left: Option<Duration>,
    missed: u32,
}

impl Growth {
    #[expect(clippy::cast_precision_loss, reason = "a fit speaks in floats")]
    pub fn sampled(&mut self, at: Duration, bytes: u64, limit: Option<u64>) {
        if self.readings.len() == WINDOW {
            self.readings.pop_front();
        }
        self.readings.push_back((at.as_secs_f64(), bytes as f64));
        match limit.and_then(|limit| self.until(limit as f64)) {
            Some(left) => (self.left, self.missed) = (Some(left), 0),
            None => {
                self.missed = self.missed.saturating_add(1);
                self.left = self.left.filter(|_| self.missed < PATIENCE);
            }
        }
    }

    /// How long until the limit is reached; absent where nothing says that it will be.
    pub fn left(&self) -> Option<Duration> {
        self.left
    }

    fn until(&self, limit: f64) -> Option<Duration> {
        if self.readings.len() < ENOUGH {
            return None;
        }
        let all: Vec<(f64, f64)> = self.readings.iter().copied().collect();
        let slope = slope(&all)?;
        let (first, second) = all.split_at(all.len() / 2);
        let base = median(all.iter().map(|(x, y)| y - slope * x).collect())?;
        let beside = median(all.iter().map(|(x, y)| (y - slope * x - base).abs()).collect())?;
        let (start, now) = (all.first()?.0, all.last()?.0);
        let (growth, level) = (slope * (now - start), base + slope * now);
        let steady = self::slope(first)?.min(self::slope(second)?) >= STEADY * slope;
        let rises = growth > GROWTH_BYTES.max(GROWTH_SHARE * level) && growth > SIGNIFICANT * beside && steady;
        // What is over the limit has no time left.
        let left = ((limit - level) / slope).max(0.0);
        if rises { Duration::try_from_secs_f64(left).ok() } else { None }
    }
}

/// The median of the slopes between readings that lie apart: a third of them may be anything.
fn slope(readings: &[(f64, f64)]) -> Option<f64> {
    let apart = (readings.len() / 3).max(1);
    let slopes = readings.iter().enumerate().flat_map(|(n, (x, y))| {
        let later = readings.iter().skip(n + apart);
        later.filter(move |(then, _)| then > x).map(move |(then, bytes)| (bytes - y) / (then - x))
    });
    median(slopes.collect())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    let middle = values.len() / 2;
    (!values.is_empty()).then(|| *values.select_nth_unstable_by(middle, f64::total_cmp).1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    /// What is left after readings of `mib(seconds)` under a limit of 2 GiB.
    fn left(minutes: u64, mib: impl Fn(f64) -> f64) -> Option<f64> {
        let mut growth = Growth::default();
        for second in (0..minutes * 60).step_by(5) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "small")]
            growth.sampled(Duration::from_secs(second), (mib(second as f64).max(0.0) * MIB) as u64, Some(2 << 30));
        }
        growth.left().map(|left| left.as_secs_f64())
    }

    /// Numbers that look random, from -1 to 1.
    fn noise(x: f64) -> f64 {
        ((x * 12.9898).sin() * 43_758.545).fract()
    }

    #[test]
    fn a_leak_is_told_with_its_time_and_noise_is_not() {
        // A megabyte each second, from 200: the limit is reached after 1848 seconds.
        let told = left(10, |x| 200.0 + x).unwrap();
        assert!((told - 1_253.0).abs() < 10.0, "{told}");
        let told = left(10, |x| 200.0 + x + 80.0 * noise(x)).unwrap();
        assert!((told - 1_253.0).abs() < 250.0, "{told}");
        for (what, none) in [
            ("noise", left(10, |x| 1_900.0 + 90.0 * noise(x))),
            ("a step", left(10, |x| if x < 300.0 { 200.0 } else { 1_800.0 })),
            ("a late step", left(10, |x| if x < 500.0 { 200.0 } else { 1_800.0 })),
            ("a peak", left(10, |x| if (200.0..320.0).contains(&x) { 1_900.0 } else { 300.0 })),
            ("a saw", left(10, |x| 300.0 + x % 60.0 * 20.0)),
            ("a start that levels off", left(10, |x| 400.0 - 300.0 * (-x / 30.0).exp())),
            ("what shrinks", left(10, |x| 1_900.0 - x)),
            ("a little", left(10, |x| 1_900.0 + x / 60.0)),
            ("two minutes", left(1, |x| 200.0 + 20.0 * x)),
        ] {
            assert_eq!(none, None, "{what}");
        }
        assert_eq!(left(10, |x| 2_100.0 + x), Some(0.0), "over the limit there is no time left");
    }

    #[test]
    fn a_forecast_is_withdrawn_when_the_growth_has_ended() {
        assert!(left(12, |x| 200.0 + x.min(600.0)).is_some());
        assert_eq!(left(25, |x| 200.0 + x.min(600.0)), None);
    }

    proptest! {
        // Each has two hundred fits.
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
        #[test]
        fn any_readings_are_fit(readings in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..200), limit in any::<u64>()) {
            let mut growth = Growth::default();
            for (at, bytes) in readings {
                growth.sampled(Duration::from_secs(at.into()), bytes, Some(limit));
            }
            prop_assert!(growth.readings.len() <= WINDOW);
        }
    }
}
