//! A hash that tells things apart without keeping them: the same on every machine and for any chunking; no secret, and none is needed.

/// FNV-1a over words instead of bytes, with the length to tell a short last word apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hash {
    state: u64,
    /// Bytes that do not fill a word yet, and how many.
    word: [u8; 8],
    filled: usize,
    length: u64,
}

impl Default for Hash {
    fn default() -> Hash {
        Hash { state: 0xcbf2_9ce4_8422_2325, word: [0; 8], filled: 0, length: 0 }
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
            let (head, rest) = bytes.split_at(bytes.len().min(8 - self.filled));
            self.word[self.filled..self.filled + head.len()].copy_from_slice(head);
            self.filled += head.len();
            if self.filled < 8 {
                return;
            }
            (self.state, self.filled, bytes) = (mix(self.state, u64::from_le_bytes(self.word)), 0, rest);
        }
        while let Some((word, rest)) = bytes.split_first_chunk() {
            self.state = mix(self.state, u64::from_le_bytes(*word));
            bytes = rest;
        }
        self.word[..bytes.len()].copy_from_slice(bytes);
        self.filled = bytes.len();
    }

    pub(crate) fn finish(mut self) -> u64 {
        self.word[self.filled..].fill(0);
        mix(mix(self.state, u64::from_le_bytes(self.word)), self.length)
    }
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
        fn chunks_do_not_matter_and_bytes_do(bytes in proptest::collection::vec(any::<u8>(), 1..60), cut in 1usize..20, at in 0usize..60) {
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
