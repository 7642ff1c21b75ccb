//! Names of traces and spans, and the line that carries them from one process to another.

use crate::telemetry::{Context, SpanId, TraceId};

/// A splitmix64: every seed gives a sequence of its own, and none repeats within 2^64 numbers.
#[derive(Clone, Debug)]
pub(super) struct Ids(u64);

impl Ids {
    pub(super) fn new(seed: u64) -> Ids {
        Ids(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// All zeros are no id.
    fn some(&mut self) -> [u8; 8] {
        loop {
            let id = self.next();
            if id != 0 {
                return id.to_be_bytes();
            }
        }
    }

    pub(super) fn span(&mut self) -> SpanId {
        SpanId(self.some())
    }

    pub(super) fn trace(&mut self) -> TraceId {
        let (high, low) = (self.some(), self.some());
        TraceId(std::array::from_fn(|i| if i < 8 { high[i] } else { low[i - 8] }))
    }
}

impl Context {
    /// What a `traceparent` says, if it is one by the letter of W3C Trace Context.
    pub fn from_traceparent(text: &str) -> Option<Context> {
        let bytes = text.as_bytes();
        // Later versions may have more to say, behind another dash.
        let whole = match (bytes.get(..2)?, bytes.len()) {
            (b"ff", _) => false,
            (b"00", len) => len == 55,
            (_, 55) => true,
            (_, _) => bytes.get(55) == Some(&b'-'),
        };
        if !whole || [2, 35, 52].iter().any(|at| bytes.get(*at) != Some(&b'-')) {
            return None;
        }
        let _version: [u8; 1] = hex(bytes.get(..2)?)?;
        let trace: [u8; 16] = hex(bytes.get(3..35)?)?;
        let span: [u8; 8] = hex(bytes.get(36..52)?)?;
        let [flags] = hex(bytes.get(53..55)?)?;
        if trace == [0; 16] || span == [0; 8] {
            return None;
        }
        Some(Context { trace: TraceId(trace), span: SpanId(span), sampled: flags & 1 == 1 })
    }

    /// As the environment or a header carries it.
    pub fn to_traceparent(self) -> String {
        format!("00-{}-{}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

impl std::fmt::Display for TraceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Display for SpanId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Lower case only, as the recommendation has it.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_traceparent_is_one_by_the_letter_or_none() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = Context::from_traceparent(good).unwrap();
        assert!(context.sampled);
        assert_eq!(context.to_traceparent(), good);
        assert!(!Context::from_traceparent(&good.replace("-01", "-00")).unwrap().sampled);
        // Only the lowest flag is ours to read.
        assert!(!Context::from_traceparent(&good.replace("-01", "-fe")).unwrap().sampled);
        assert!(Context::from_traceparent(&format!("cc{}", &good[2..])).is_some(), "a later version");
        assert!(Context::from_traceparent(&format!("cc{}-more", &good[2..])).is_some(), "a later version with more");
        for bad in [
            "",
            "00",
            &good[..54],
            &format!("{good}-"),
            &format!("{good}-more"),
            &format!(" {good}"),
            &good.to_uppercase(),
            &good.replacen('-', "_", 1),
            &format!("ff{}", &good[2..]),
            &format!("0x{}", &good[2..]),
            &format!("cc{}.more", &good[2..]),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0x",
            "00-4bf92f3577b34da6a3ce929d0e0e4é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Context::from_traceparent(bad), None, "{bad}");
        }
    }

    #[test]
    fn ids_follow_from_the_seed_and_do_not_repeat() {
        let ids = |seed| {
            let mut ids = Ids::new(seed);
            (0..10_000).map(|_| ids.span()).collect::<BTreeSet<_>>()
        };
        assert_eq!(ids(1), ids(1));
        assert_eq!(ids(1).union(&ids(u64::MAX)).count(), 20_000);
        assert!(!ids(0).contains(&SpanId([0; 8])));
        // The state that gives zero is passed over.
        let mut zero = Ids::new(0x9e37_79b9_7f4a_7c15_u64.wrapping_neg());
        assert_ne!(zero.span(), SpanId([0; 8]));
    }
}
