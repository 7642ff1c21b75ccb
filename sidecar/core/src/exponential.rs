//! A base-2 exponential histogram, as OpenTelemetry's data model has it: buckets whose bounds grow by a constant factor, so that no
//! bounds need to be chosen. The factor is as fine as [`MAX_BUCKETS`] allow for what was seen; it only ever gets coarser.

/// As many as the OpenTelemetry SDKs keep: 4 % of relative error over four orders of magnitude, in a kilobyte.
pub const MAX_BUCKETS: usize = 160;
/// The finest: here two neighbouring bounds differ by less than a millionth.
const MAX_SCALE: i32 = 20;

/// Counts of positive values: bucket `i` is what is above `base^i` and at most `base^(i+1)`, with `base = 2^(2^-scale)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exponential {
    scale: i32,
    /// What was zero. Nothing that is measured here is negative; if it were, it would be here.
    zero: u64,
    /// The bucket that the first of `counts` belongs to.
    offset: i32,
    counts: Vec<u64>,
}

impl Default for Exponential {
    fn default() -> Exponential {
        Exponential { scale: MAX_SCALE, zero: 0, offset: 0, counts: Vec::new() }
    }
}

impl Exponential {
    pub fn scale(&self) -> i32 {
        self.scale
    }

    pub fn zero(&self) -> u64 {
        self.zero
    }

    pub fn offset(&self) -> i32 {
        self.offset
    }

    /// How many values are in each bucket from [`Exponential::offset`] on.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Counts a finite value.
    pub fn observe(&mut self, value: f64) {
        if value <= 0.0 {
            self.zero = self.zero.saturating_add(1);
            return;
        }
        let at = index(value, MAX_SCALE);
        self.make_room(at, at, MAX_SCALE);
        let slot = self.slot(at >> (MAX_SCALE - self.scale));
        self.counts[slot] = self.counts[slot].saturating_add(1);
    }

    /// Adds what another one counted, as if this one had seen it.
    pub fn merge(&mut self, other: &Exponential) {
        self.zero = self.zero.saturating_add(other.zero);
        let Some(last) = other.last() else { return };
        self.coarsen_to(other.scale);
        self.make_room(other.offset, last, other.scale);
        for (i, n) in (other.offset..).zip(&other.counts) {
            let slot = self.slot(i >> (other.scale - self.scale));
            self.counts[slot] = self.counts[slot].saturating_add(*n);
        }
    }

    /// What was counted after `earlier`, which is this one as it once was.
    pub fn since(&self, earlier: &Exponential) -> Exponential {
        let mut rest = self.clone();
        rest.zero = rest.zero.saturating_sub(earlier.zero);
        for (i, n) in (earlier.offset..).zip(&earlier.counts) {
            let at = (i >> (earlier.scale - self.scale).max(0)) - rest.offset;
            if let Some(count) = usize::try_from(at).ok().and_then(|at| rest.counts.get_mut(at)) {
                *count = count.saturating_sub(*n);
            }
        }
        rest.trim();
        rest
    }

    fn last(&self) -> Option<i32> {
        let n = i32::try_from(self.counts.len()).expect("there are at most MAX_BUCKETS");
        (n > 0).then(|| self.offset + n - 1)
    }

    /// Makes the buckets `low` to `high`, numbered at `scale` (as fine as this one or finer), exist.
    fn make_room(&mut self, low: i32, high: i32, scale: i32) {
        let span = |low: i32, high: i32| usize::try_from(high - low).map_or(usize::MAX, |n| n.saturating_add(1));
        let (mut low, mut high) = (low >> (scale - self.scale), high >> (scale - self.scale));
        loop {
            if let Some(last) = self.last() {
                (low, high) = (low.min(self.offset), high.max(last));
            }
            if span(low, high) <= MAX_BUCKETS {
                break;
            }
            self.coarsen_to(self.scale - 1);
            (low, high) = (low >> 1, high >> 1);
        }
        if self.counts.is_empty() {
            self.offset = low;
        }
        let before = self.offset - low;
        self.counts.splice(..0, (0..before).map(|_| 0));
        self.offset = low;
        self.counts.resize(span(low, high), 0);
    }

    /// Joins neighbouring buckets until the scale is `scale`; a finer one cannot be had again.
    fn coarsen_to(&mut self, scale: i32) {
        if scale >= self.scale {
            return;
        }
        let by = self.scale - scale;
        self.scale = scale;
        let Some(last) = self.last() else { return };
        let first = self.offset >> by;
        let mut joined = vec![0_u64; usize::try_from((last >> by) - first).map_or(0, |n| n + 1)];
        for (i, n) in (self.offset..).zip(&self.counts) {
            if let Some(slot) = usize::try_from((i >> by) - first).ok().and_then(|at| joined.get_mut(at)) {
                *slot = slot.saturating_add(*n);
            }
        }
        self.offset = first;
        self.counts = joined;
    }

    fn slot(&self, bucket: i32) -> usize {
        usize::try_from(bucket - self.offset).expect("make_room came first")
    }

    /// Leaves out what is empty at both ends.
    fn trim(&mut self) {
        let end = self.counts.iter().rposition(|n| *n > 0).map_or(0, |last| last + 1);
        self.counts.truncate(end);
        let start = self.counts.iter().position(|n| *n > 0).unwrap_or(0);
        self.counts.drain(..start);
        self.offset += i32::try_from(start).expect("there are at most MAX_BUCKETS");
    }
}

/// The bucket of a positive value.
fn index(value: f64, scale: i32) -> i32 {
    const FRACTION: u32 = f64::MANTISSA_DIGITS - 1;
    // The least normal number stands for the few below it, as the data model allows.
    let bits = value.clamp(f64::MIN_POSITIVE, f64::MAX).to_bits();
    let exponent = i32::try_from(bits >> FRACTION).expect("eleven bits, and no sign") - (f64::MAX_EXP - 1);
    let fraction = bits & ((1 << FRACTION) - 1);
    // A power of two is the upper bound of the bucket below.
    if fraction == 0 {
        return if scale >= 0 { (exponent << scale) - 1 } else { (exponent - 1) >> -scale };
    }
    if scale <= 0 {
        return exponent >> -scale;
    }
    // In [1, 2), so that the logarithm is as exact as it can be, and inside of its power of two whatever it is rounded to.
    let mantissa = f64::from_bits(fraction | (1_f64.to_bits()));
    let within = mantissa.log2() * f64::from(1 << scale);
    #[expect(clippy::cast_possible_truncation, reason = "below 2^scale")]
    let within = (within.ceil() as i32 - 1).clamp(0, (1 << scale) - 1);
    (exponent << scale) + within
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[f64]) -> Exponential {
        let mut histogram = Exponential::default();
        values.iter().for_each(|value| histogram.observe(*value));
        histogram
    }

    /// The upper bound of a bucket.
    fn bound(bucket: i64, scale: i32) -> f64 {
        (bucket as f64 * f64::from(-scale).exp2()).exp2()
    }

    #[test]
    fn a_bound_is_in_the_bucket_below_it() {
        for (scale, value, bucket) in [
            (0, 1.0, -1),
            (0, 1.5, 0),
            (0, 2.0, 0),
            (0, 2.000_001, 1),
            (0, 0.5, -2),
            (1, 1.0, -1),
            (1, 1.4, 0),
            (1, 1.42, 1),
            (1, 2.0, 1),
            (-1, 1.0, -1),
            (-1, 4.0, 0),
            (-1, 4.1, 1),
            (-1, 0.25, -2),
            (-1, 0.26, -1),
            (-2, 16.0, 0),
            (-2, 16.1, 1),
            (3, 1.0, -1),
            (3, 2.0, 7),
            (3, 2.1, 8),
            (20, 2.0, (1 << 20) - 1),
            (-10, f64::MIN_POSITIVE, -1),
            (-10, f64::MAX, 0),
            (-10, f64::from_bits(1), -1),
        ] {
            assert_eq!(index(value, scale), bucket, "{value} at scale {scale}");
        }
    }

    #[test]
    fn one_value_is_known_to_a_millionth_and_many_to_what_there_is_room_for() {
        let one = of(&[0.123; 7]);
        assert_eq!((one.scale(), one.counts()), (20, &[7][..]));
        let two = of(&[0.001, 1_000.0]);
        assert_eq!((two.scale(), two.counts().len()), (3, 160), "two values over twenty powers of two");
        let many = of(&(1..=100_000).map(|n| f64::from(n) / 10.0).collect::<Vec<_>>());
        assert_eq!((many.scale(), many.counts().iter().sum::<u64>()), (3, 100_000));
        assert!(many.counts().len() > MAX_BUCKETS / 2, "no coarser than it has to be: {}", many.counts().len());
        let all = of(&[f64::from_bits(1), f64::MAX, 0.0, -1.0]);
        assert_eq!((all.zero(), all.counts().iter().sum::<u64>()), (2, 2));
    }

    fn value() -> impl Strategy<Value = f64> {
        prop_oneof![
            Just(0.0),
            0.000_001..1_000.0,
            (-40..40).prop_map(|e| f64::from(e).exp2()),
            any::<f64>().prop_map(f64::abs).prop_filter("finite", |v| v.is_finite()),
            (1..100_u32).prop_map(f64::from),
        ]
    }

    fn values() -> impl Strategy<Value = Vec<f64>> {
        prop_oneof![prop::collection::vec(value(), 0..300), prop::collection::vec(0.001..100.0, 0..300)]
    }

    proptest! {
        #[test]
        fn each_value_is_counted_once_and_in_its_own_bucket(values in values()) {
            let histogram = of(&values);
            prop_assert!(histogram.counts().len() <= MAX_BUCKETS);
            let mut expected = std::collections::BTreeMap::<i32, u64>::new();
            for value in values.iter().filter(|value| **value > 0.0) {
                let bucket = index(*value, histogram.scale());
                *expected.entry(bucket).or_default() += 1;
                // Except for what cannot be told apart from the bound, or is below the least normal number.
                if histogram.scale() >= -8 && *value > f64::MIN_POSITIVE {
                    let (low, high) = (bound(bucket.into(), histogram.scale()), bound(i64::from(bucket) + 1, histogram.scale()));
                    prop_assert!(low * (1.0 - 1e-9) < *value && *value <= high * (1.0 + 1e-9), "{low} {value} {high}");
                }
            }
            let counted: std::collections::BTreeMap<i32, u64> =
                (histogram.offset()..).zip(histogram.counts().iter().copied()).filter(|(_, n)| *n > 0).collect();
            prop_assert_eq!(counted, expected);
            prop_assert_eq!(histogram.zero() as usize, values.iter().filter(|value| **value == 0.0).count());
            // Not one step coarser than it has to be.
            if let (Some(low), Some(high)) = (
                values.iter().copied().filter(|v| *v > 0.0).reduce(f64::min),
                values.iter().copied().reduce(f64::max),
            ) && histogram.scale() < MAX_SCALE {
                let scale = histogram.scale() + 1;
                prop_assert!((index(high, scale) - index(low, scale)) as usize >= MAX_BUCKETS);
            }
        }

        #[test]
        fn a_merge_is_as_if_one_had_seen_all(a in values(), b in values()) {
            let mut merged = of(&a);
            merged.merge(&of(&b));
            let all = of(&[a, b].concat());
            prop_assert_eq!(merged, all);
        }

        #[test]
        fn what_came_later_is_what_is_left(a in values(), b in values()) {
            let before = of(&a);
            let mut after = before.clone();
            b.iter().for_each(|value| after.observe(*value));
            let rest = after.since(&before);
            prop_assert_eq!(rest.scale(), after.scale());
            let mut expected = of(&b);
            expected.coarsen_to(after.scale());
            expected.trim();
            prop_assert_eq!((rest.zero(), rest.counts()), (expected.zero(), expected.counts()));
            if !rest.counts().is_empty() {
                prop_assert_eq!(rest.offset(), expected.offset());
            }
        }
    }
}
