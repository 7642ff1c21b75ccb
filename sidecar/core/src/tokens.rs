//! Tokens and money as exact numbers.
//!
//! Money is counted in whole picodollars: the finest price (a hundredth of a dollar for a million cached tokens) times the finest
//! surcharge is still a whole number of them, so sums of increments equal totals to the last digit, in any order.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

/// Tokens by kind, as the API bills them: `input` excludes what was cached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Tokens {
    pub input: u64,
    pub output: u64,
    pub cache_read: u64,
    pub cache_write_5m: u64,
    pub cache_write_1h: u64,
}

/// The kinds in the order of [`Tokens::by_kind`], as label values.
pub const TOKEN_KINDS: [&str; 5] = ["input", "output", "cache_read", "cache_write_5m", "cache_write_1h"];

impl Tokens {
    pub fn by_kind(&self) -> [u64; 5] {
        [self.input, self.output, self.cache_read, self.cache_write_5m, self.cache_write_1h]
    }

    pub fn from_kinds([input, output, cache_read, cache_write_5m, cache_write_1h]: [u64; 5]) -> Tokens {
        Tokens { input, output, cache_read, cache_write_5m, cache_write_1h }
    }

    pub fn total(&self) -> u64 {
        self.by_kind().into_iter().fold(0, u64::saturating_add)
    }

    /// What was sent to the model: fresh, read from the cache and written to it.
    pub fn prompt(&self) -> u64 {
        self.total().saturating_sub(self.output)
    }

    pub fn is_zero(&self) -> bool {
        *self == Tokens::default()
    }

    pub fn saturating_sub(self, other: Tokens) -> Tokens {
        self.zip(other, u64::saturating_sub)
    }

    pub fn max(self, other: Tokens) -> Tokens {
        self.zip(other, u64::max)
    }

    /// Whether no kind is below the other's.
    pub fn covers(&self, other: &Tokens) -> bool {
        self.by_kind().iter().zip(other.by_kind()).all(|(a, b)| *a >= b)
    }

    fn zip(self, other: Tokens, f: impl Fn(u64, u64) -> u64) -> Tokens {
        let (a, b) = (self.by_kind(), other.by_kind());
        Tokens::from_kinds(std::array::from_fn(|i| f(a[i], b[i])))
    }
}

impl Add for Tokens {
    type Output = Tokens;
    fn add(self, other: Tokens) -> Tokens {
        self.zip(other, u64::saturating_add)
    }
}

impl AddAssign for Tokens {
    fn add_assign(&mut self, other: Tokens) {
        *self = *self + other;
    }
}

impl Sum for Tokens {
    fn sum<I: Iterator<Item = Tokens>>(all: I) -> Tokens {
        all.fold(Tokens::default(), Add::add)
    }
}

/// US dollars, in whole picodollars. Up to 18 million dollars; saturates instead of wrapping.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Usd(u64);

impl Usd {
    pub const ZERO: Usd = Usd(0);
    const PICO: f64 = 1e12;

    pub const fn from_pico(pico: u64) -> Usd {
        Usd(pico)
    }

    pub const fn pico(self) -> u64 {
        self.0
    }

    /// The nearest amount. What is no amount of money (negative, NaN) is nothing; what is too much is the maximum.
    pub fn from_f64(usd: f64) -> Usd {
        // `as` saturates, and maps NaN to zero: just what is promised.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, as promised")]
        Usd((usd * Usd::PICO).round() as u64)
    }

    /// In dollars, as close as a float can be: the shortest decimal of it is the amount itself below nine thousand dollars.
    pub fn to_f64(self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "the caller asks for a float")]
        let pico = self.0 as f64;
        pico / Usd::PICO
    }

    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    pub fn saturating_sub(self, other: Usd) -> Usd {
        Usd(self.0.saturating_sub(other.0))
    }
}

impl Add for Usd {
    type Output = Usd;
    fn add(self, other: Usd) -> Usd {
        Usd(self.0.saturating_add(other.0))
    }
}

impl Sub for Usd {
    type Output = Usd;
    /// Saturates at zero.
    fn sub(self, other: Usd) -> Usd {
        self.saturating_sub(other)
    }
}

impl AddAssign for Usd {
    fn add_assign(&mut self, other: Usd) {
        *self = *self + other;
    }
}

impl Sum for Usd {
    fn sum<I: Iterator<Item = Usd>>(all: I) -> Usd {
        all.fold(Usd::ZERO, Add::add)
    }
}

impl fmt::Display for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_f64())
    }
}

impl fmt::Debug for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${self}")
    }
}

impl serde::Serialize for Usd {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_f64(self.to_f64())
    }
}

impl<'de> serde::Deserialize<'de> for Usd {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Usd, D::Error> {
        f64::deserialize(d).map(Usd::from_f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_increments_are_exact() {
        let cents: Usd = (0..10).map(|_| Usd::from_f64(0.1)).sum();
        assert_eq!(cents, Usd::from_f64(1.0));
        assert_eq!(cents.to_string(), "1");
        assert_eq!(Usd::from_f64(0.009108600000000001).to_string(), "0.0091086");
    }

    #[test]
    fn what_is_no_money_is_nothing_and_too_much_is_the_maximum() {
        assert_eq!(Usd::from_f64(f64::NAN), Usd::ZERO);
        assert_eq!(Usd::from_f64(-3.0), Usd::ZERO);
        assert_eq!(Usd::from_f64(1e300), Usd::from_pico(u64::MAX));
        assert_eq!(Usd::from_pico(u64::MAX) + Usd::from_f64(1.0), Usd::from_pico(u64::MAX));
    }
}
