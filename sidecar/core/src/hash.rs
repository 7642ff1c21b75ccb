//! A hash that tells things apart without keeping them: the same on every machine and for any chunking; no secret, and none is needed.

/// Bytes at a time: what multiplies at once costs no more than one.
const BLOCK: usize = 32;
/// Odd, so that no bit of a word is lost, and different, so that words do not change places unseen.
const ODD: [u64; BLOCK / 8] = [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb, 0xff51_afd7_ed55_8ccd];

/// FNV-1a over blocks instead of bytes, with the length to tell a short last block apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hash {
    state: u64,
    /// Bytes that do not fill a block yet, and how many.
    block: [u8; BLOCK],
    filled: usize,
    length: u64,
}

impl Default for Hash {
    fn default() -> Hash {
        Hash { state: 0xcbf2_9ce4_8422_2325, block: [0; BLOCK], filled: 0, length: 0 }
    }
}

impl Hash {
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Hash::default();
        hash.put(bytes);
        hash.finish()
    }

    pub(crate) fn put(&mut self, mut bytes: &[u8]) {
        self.length = self.length.wrapping_add(bytes.len() as u64);
        if self.filled > 0 {
            let (head, rest) = bytes.split_at(bytes.len().min(BLOCK - self.filled));
            self.block[self.filled..self.filled + head.len()].copy_from_slice(head);
            self.filled += head.len();
            if self.filled < BLOCK {
                return;
            }
            (self.state, self.filled, bytes) = (mix(self.state, word(&self.block)), 0, rest);
        }
        while let Some((block, rest)) = bytes.split_first_chunk() {
            self.state = mix(self.state, word(block));
            bytes = rest;
        }
        self.block[..bytes.len()].copy_from_slice(bytes);
        self.filled = bytes.len();
    }

    pub(crate) fn finish(mut self) -> u64 {
        self.block[self.filled..].fill(0);
        mix(mix(self.state, word(&self.block)), self.length)
    }
}

fn word(block: &[u8; BLOCK]) -> u64 {
    let words = block.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
    words.zip(ODD).fold(0, |sum, (word, odd)| sum.wrapping_add(word.wrapping_mul(odd)))
}

/// One more word.
pub(crate) fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
    // High bits reach the low ones only this way.
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_do_not_matter_and_bytes_do(bytes in proptest::collection::vec(any::<u8>(), 1..200), cut in 1usize..50, at in 0usize..200) {
            let mut hash = Hash::default();
            bytes.chunks(cut).for_each(|chunk| hash.put(chunk));
            prop_assert_eq!(hash.finish(), Hash::of(&bytes));
            let mut other = bytes.clone();
            let at = at % bytes.len();
            other[at] ^= 1;
            prop_assert_ne!(Hash::of(&other), Hash::of(&bytes));
            prop_assert_ne!(Hash::of(&bytes[1..]), Hash::of(&bytes));
        }
    }
}
