//! Bytes that somebody has not taken yet: a queue in memory up to a bound, then in a file without a name, then in memory up to a
//! hard bound.
//!
//! ```text
//!   push ──► front (memory) ──────────────────────────────► pop
//!        └─► tail (memory) ──► file, block by block ──► pop
//!              └─► front, when the file is empty
//! ```
//!
//! Nothing is lost and the order is kept. It knows neither descriptors nor threads.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, Mode, OFlags};

/// A unit of memory: what one read of a pipe yields at most by default.
const BLOCK: usize = 64 * 1024;

/// What has been read is given back to the file system in steps of this size: a reader that is slow but never done must not make
/// the file grow for ever.
const HOLE: u64 = 8 * 1024 * 1024;

/// How much may wait, and where.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    /// In memory before the file is used.
    pub(crate) memory: usize,
    /// In the file.
    pub(crate) file: u64,
    /// In memory when there is no file, or no room in it.
    pub(crate) hard: usize,
    /// Where to put the file: the first directory that takes it.
    pub(crate) dirs: Vec<PathBuf>,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Backlog {
    bounds: Bounds,
    front: Memory,
    spill: Spill,
    tail: Memory,
    /// Bytes that went through the file.
    spilled: u64,
}

impl Backlog {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Self { bounds, front: Memory::default(), spill: Spill::Unopened, tail: Memory::default(), spilled: 0 }
    }

    pub(crate) fn len(&self) -> u64 {
        (self.front.len + self.tail.len) as u64 + self.spill.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that went through the file since the beginning.
    pub(crate) fn spilled(&self) -> u64 {
        self.spilled
    }

    /// Whether `n` more bytes will be taken. A file that turns out to be full does not break the promise: the rest goes to memory.
    pub(crate) fn has_room(&mut self, n: usize) -> bool {
        let memory = self.front.len + self.tail.len + n;
        if memory <= self.bounds.memory && self.spill.len() == 0 {
            return true;
        }
        // A tail of more than a block is one that the file did not take.
        let spills = self.tail.len < BLOCK && self.spill.takes(n + BLOCK, &self.bounds);
        spills || memory <= self.bounds.hard
    }

    /// Takes all of `bytes`, or none and says so.
    #[cfg(test)]
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        if !self.has_room(bytes.len()) {
            return false;
        }
        self.push_always(bytes);
        true
    }

    /// Takes `bytes` whatever the bounds say: for the few that must not be lost.
    pub(crate) fn push_always(&mut self, bytes: &[u8]) {
        if self.spill.len() == 0 && self.tail.len == 0 && self.front.len + bytes.len() <= self.bounds.memory {
            return self.front.push(bytes);
        }
        self.tail.push(bytes);
        // Whole blocks at whole blocks' places: half of the work of many small writes, for us and for the file system.
        while self.tail.len >= BLOCK && self.spill.takes(BLOCK, &self.bounds) && self.spill.push(self.tail.first()) {
            self.tail.consume(BLOCK);
            self.spilled += BLOCK as u64;
        }
    }

    /// The oldest bytes, or nothing when it is empty. An error means that the file cannot be read: what was in it is gone, and how
    /// much that was.
    pub(crate) fn front(&mut self) -> Result<&[u8], Unreadable> {
        if self.front.len == 0 {
            if let Some(part) = self.spill.first() {
                let mut block = self.front.block();
                let read = part.read(&mut block);
                self.front.append(block);
                self.read(part, read)?;
            } else {
                std::mem::swap(&mut self.front, &mut self.tail);
            }
        }
        Ok(self.front.first())
    }

    /// Drops `n` bytes of what [`Self::front`] gave.
    pub(crate) fn consume(&mut self, n: usize) {
        self.front.consume(n);
    }

    /// The oldest block, exchanged for an empty one; or where to read it, so that the reading needs no lock that a writer waits for.
    /// Not to be mixed with [`Self::consume`].
    pub(crate) fn next(&mut self, block: &mut Vec<u8>) -> Next {
        if self.front.len == 0 {
            if let Some(part) = self.spill.first() {
                return Next::InFile(part);
            }
            std::mem::swap(&mut self.front, &mut self.tail);
        }
        if self.front.exchange(block) { Next::Block } else { Next::Nothing }
    }

    /// A part of the file was read, outside. What is given back is the file, when it is empty: dropping it may take long.
    pub(crate) fn read(&mut self, part: Part, read: io::Result<()>) -> Result<Option<Arc<OwnedFd>>, Unreadable> {
        match read {
            Ok(()) => Ok(self.spill.advance(part.len)),
            Err(source) => {
                let bytes = self.spill.len();
                self.spill = Spill::Broken;
                Err(Unreadable { bytes, source })
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.front = Memory::default();
        self.tail = Memory::default();
        self.spill = Spill::Unopened;
    }
}

/// Where the oldest bytes are.
#[derive(Debug)]
pub(crate) enum Next {
    Nothing,
    Block,
    InFile(Part),
}

/// A part of the file that nobody writes to.
#[derive(Debug)]
pub(crate) struct Part {
    file: Arc<OwnedFd>,
    at: u64,
    len: usize,
}

impl Part {
    /// Reads it whole into `block`.
    pub(crate) fn read(&self, block: &mut Vec<u8>) -> io::Result<()> {
        block.resize(self.len, 0);
        let mut done = 0;
        while done < self.len {
            match rustix::io::pread(&self.file, &mut block[done..], self.at + done as u64) {
                Ok(0) => {
                    block.clear();
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    block.clear();
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }
}

/// The file could not be read back.
#[derive(Debug, thiserror::Error)]
#[error("{bytes} bytes cannot be read back from the spill file")]
pub(crate) struct Unreadable {
    pub(crate) bytes: u64,
    #[source]
    pub(crate) source: io::Error,
}

/// A queue of bytes in blocks. One spare block is kept, the others are given back.
#[derive(Debug, Default)]
struct Memory {
    blocks: VecDeque<Vec<u8>>,
    /// How much of the first block was taken.
    read: usize,
    len: usize,
    spare: Option<Vec<u8>>,
}

impl Memory {
    fn push(&mut self, mut bytes: &[u8]) {
        self.len += bytes.len();
        while !bytes.is_empty() {
            if self.blocks.back().is_none_or(|b| b.len() == BLOCK) {
                let block = self.block();
                self.blocks.push_back(block);
            }
            let block = self.blocks.back_mut().expect("pushed above when there was none");
            let n = bytes.len().min(BLOCK - block.len());
            block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
    }

    fn append(&mut self, block: Vec<u8>) {
        if !block.is_empty() {
            self.len += block.len();
            self.blocks.push_back(block);
        }
    }

    /// Takes the first block out and keeps `block` for later; says whether there was one.
    fn exchange(&mut self, block: &mut Vec<u8>) -> bool {
        let Some(first) = self.blocks.pop_front() else { return false };
        self.len -= first.len();
        let mut empty = std::mem::replace(block, first);
        empty.clear();
        if empty.capacity() >= BLOCK {
            self.spare = Some(empty);
        }
        true
    }

    fn block(&mut self) -> Vec<u8> {
        self.spare.take().unwrap_or_else(|| Vec::with_capacity(BLOCK))
    }

    fn first(&self) -> &[u8] {
        self.blocks.front().map_or(&[], |b| &b[self.read..])
    }

    fn consume(&mut self, n: usize) {
        if n == 0 {
            return;
        }
        self.read += n;
        self.len -= n;
        let first = self.blocks.front().expect("only bytes that were there are consumed");
        assert!(self.read <= first.len(), "only bytes of the first block are consumed");
        if self.read == first.len() {
            self.read = 0;
            if let Some(mut block) = self.blocks.pop_front() {
                block.clear();
                self.spare = Some(block);
            }
        }
    }
}

/// The file: written at its end, read at an offset, given up when it is empty.
#[derive(Debug)]
enum Spill {
    Unopened,
    Open {
        file: Arc<OwnedFd>,
        read: u64,
        write: u64,
        /// Up to here the file system has its blocks back.
        freed: u64,
    },
    /// No directory took a file, or it could not be read.
    Broken,
}

impl Spill {
    fn len(&self) -> u64 {
        match self {
            Self::Open { read, write, .. } => write - read,
            Self::Unopened | Self::Broken => 0,
        }
    }

    fn takes(&mut self, n: usize, bounds: &Bounds) -> bool {
        if bounds.file == 0 {
            return false;
        }
        if matches!(self, Self::Unopened) {
            *self = match bounds.dirs.iter().find_map(|dir| nameless(dir)) {
                Some(file) => Self::Open { file: Arc::new(file), read: 0, write: 0, freed: 0 },
                None => Self::Broken,
            };
        }
        match self {
            Self::Open { write, freed, .. } => *write - *freed + n as u64 <= bounds.file,
            Self::Unopened | Self::Broken => false,
        }
    }

    /// Writes a block; says whether the file took it. What it took of one that it did not take whole is written over later.
    fn push(&mut self, block: &[u8]) -> bool {
        let Self::Open { file, write, .. } = self else { return false };
        let mut done = 0;
        while done < block.len() {
            match rustix::io::pwrite(&**file, &block[done..], *write + done as u64) {
                Ok(n) if n > 0 => done += n,
                Err(rustix::io::Errno::INTR) => {}
                // No space, a quota, a limit on file sizes: memory takes over.
                Ok(_) | Err(_) => return false,
            }
        }
        *write += done as u64;
        true
    }

    fn first(&self) -> Option<Part> {
        let Self::Open { file, read, write, .. } = self else { return None };
        let len = usize::try_from(*write - *read).unwrap_or(usize::MAX).min(BLOCK);
        (len > 0).then(|| Part { file: Arc::clone(file), at: *read, len })
    }

    /// `n` more bytes were read. An empty file is given up: the next one begins at its beginning again.
    fn advance(&mut self, n: usize) -> Option<Arc<OwnedFd>> {
        let Self::Open { file, read, write, freed } = self else { return None };
        *read += n as u64;
        if read == write {
            let file = Arc::clone(file);
            *self = Self::Unopened;
            return Some(file);
        }
        if *read - *freed >= HOLE {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&*file, hole, *freed, *read - *freed).is_ok() {
                *freed = *read;
            }
        }
        None
    }
}

/// A file that nobody else can open and that vanishes with us.
fn nameless(dir: &std::path::Path) -> Option<OwnedFd> {
    let owner = Mode::RUSR | Mode::WUSR;
    if let Ok(file) = rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, owner) {
        return Some(file);
    }
    // Some file systems (gVisor's, NFS) have no O_TMPFILE.
    let name = dir.join(format!(".agent-sidecar-{:016x}", super::random()));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&name, flags, owner).ok()?;
    rustix::fs::unlink(&name).ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn bounds(memory: usize, file: u64, hard: usize) -> Bounds {
        Bounds { memory, file, hard, dirs: vec!["/no/such/dir".into(), std::env::temp_dir()] }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push(usize),
        Pop(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![(0..200_000usize).prop_map(Op::Push), (0..200_000usize).prop_map(Op::Pop)]
    }

    /// Everything, block by block.
    fn drain(backlog: &mut Backlog) -> Vec<u8> {
        let (mut all, mut block) = (Vec::new(), Vec::new());
        loop {
            match backlog.next(&mut block) {
                Next::Nothing => return all,
                Next::Block => all.extend_from_slice(&block),
                Next::InFile(part) => {
                    let read = part.read(&mut block);
                    backlog.read(part, read).unwrap();
                    all.extend_from_slice(&block);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn block_by_block_it_is_the_same(sizes in proptest::collection::vec(0..200_000usize, 1..20), memory in 0..300_000usize) {
            let mut backlog = Backlog::new(bounds(memory, 1_000_000, usize::MAX));
            for half in sizes.chunks(sizes.len().div_ceil(2)) {
                let mut expected = Vec::new();
                for (n, size) in half.iter().enumerate() {
                    let bytes = vec![u8::try_from(n).unwrap(); *size];
                    prop_assert!(backlog.push(&bytes));
                    expected.extend(bytes);
                }
                prop_assert!(drain(&mut backlog) == expected);
                prop_assert!(backlog.is_empty());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Against a queue of bytes without bounds: what was taken comes out, in order, and only what does not fit is refused.
        #[test]
        fn what_was_taken_comes_out_in_order(
            ops in proptest::collection::vec(op(), 1..60),
            memory in 0..300_000usize,
            file in prop_oneof![Just(0u64), 0..600_000u64, Just(u64::MAX / 2)],
            extra in 0..300_000usize,
        ) {
            let mut backlog = Backlog::new(bounds(memory, file, memory + extra));
            let mut model: VecDeque<u8> = VecDeque::new();
            let mut next = 0u8;
            for op in ops {
                match op {
                    Op::Push(n) => {
                        let bytes: Vec<u8> = (0..n).map(|_| { next = next.wrapping_mul(31).wrapping_add(7); next }).collect();
                        if backlog.push(&bytes) {
                            model.extend(&bytes);
                        } else {
                            prop_assert!(model.len() + n > memory, "refused though there was room");
                        }
                    }
                    Op::Pop(n) => {
                        let mut left = n.min(model.len());
                        while left > 0 {
                            let front = backlog.front().unwrap();
                            let n = front.len().min(left);
                            prop_assert!(n > 0);
                            let expected: Vec<u8> = model.drain(..n).collect();
                            prop_assert!(front[..n] == expected[..]);
                            backlog.consume(n);
                            left -= n;
                        }
                    }
                }
                prop_assert_eq!(backlog.len(), model.len() as u64);
            }
        }
    }

    #[test]
    fn without_a_directory_the_hard_bound_holds() {
        let mut b = Backlog::new(Bounds { memory: 10, file: 1 << 30, hard: 25, dirs: vec!["/no/such/dir".into()] });
        assert!(b.push(&[1; 10]));
        assert!(b.push(&[2; 15]));
        assert!(!b.push(&[3; 1]));
        assert_eq!((b.len(), b.spilled()), (25, 0));
    }

    #[test]
    fn a_reader_that_is_never_done_does_not_make_the_file_grow() {
        let mut b = Backlog::new(bounds(0, 2 * HOLE, 0));
        let chunk = vec![7u8; BLOCK];
        assert!(b.push(&chunk));
        for _ in 0..10 * HOLE / BLOCK as u64 {
            assert!(b.push(&chunk));
            let n = b.front().unwrap().len();
            b.consume(n);
        }
        assert_eq!(b.len(), BLOCK as u64);
    }
}
