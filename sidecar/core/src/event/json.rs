//! Reads JSON without building it: a cursor that walks over one text and hands out what is asked for.
//!
//! Fields are lenient: what is of the wrong type is skipped, read as absent, and counted. So is the content of strings: their ends are
//! found, their escapes are read only where somebody wants the text, and bytes that are no UTF-8 do not cost the line. What is no
//! JSON at all ends the walk: from there on everything is absent, and [`Json::end`] says why.

use std::borrow::Cow;

use memchr::{memchr, memchr2};

use super::Broken;

/// Objects and lists inside each other: more than any real message has, and what a word of bits remembers.
const DEPTH: u32 = 128;
/// Elements of one list that are kept: more is no real message.
pub(super) const ELEMENTS: usize = 10_000;
/// Bytes of a name or an id that are kept.
const NAME: usize = 256;

/// See the module's head.
pub(super) struct Json<'a> {
    text: &'a [u8],
    at: usize,
    /// Why the walk ended early.
    broken: Option<Broken>,
    /// Fields so far that were not of the type they promise.
    pub(super) misshapen: u32,
}

impl<'a> Json<'a> {
    pub(super) fn new(text: &'a [u8]) -> Json<'a> {
        Json { text, at: 0, broken: None, misshapen: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn seek(&mut self, at: usize) {
        if self.broken.is_none() {
            self.at = at;
        }
    }

    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// What is not read yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// The first byte of the next token, which is not taken; zero at the end.
    #[inline]
    pub(super) fn peek(&mut self) -> u8 {
        match self.text.get(self.at) {
            Some(&byte) if byte > b' ' => byte,
            _ => self.peek_far(),
        }
    }

    #[cold]
    fn peek_far(&mut self) -> u8 {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied().unwrap_or_default()
    }

    /// Here is no JSON, or no more of it.
    #[cold]
    fn fail(&mut self) {
        let broken = if self.at < self.text.len() { Broken::NotJson } else { Broken::Truncated };
        self.broken.get_or_insert(broken);
        self.at = self.text.len();
    }

    pub(super) fn intact(&self) -> bool {
        self.broken.is_none()
    }

    /// Nothing but blanks may follow. What went wrong so far is said here.
    pub(super) fn end(&mut self) -> Result<(), Broken> {
        self.peek();
        if self.at < self.text.len() {
            self.fail();
        }
        self.broken.map_or(Ok(()), Err)
    }

    /// One value, whatever it is.
    #[inline]
    pub(super) fn skip(&mut self) {
        match self.peek() {
            b'"' => _ = self.string(),
            b'{' | b'[' => self.skip_nested(),
            _ => self.skip_word(),
        }
    }

    fn skip_nested(&mut self) {
        // One bit for each that is open: set for an object.
        let (mut objects, mut depth) = (0u128, 0u32);
        loop {
            let open = match self.peek() {
                b'{' if self.opened(b'}') => Some(1),
                b'[' if self.opened(b']') => Some(0),
                b'"' => {
                    self.string();
                    None
                }
                // An empty one was taken whole.
                b'{' | b'[' => None,
                _ => {
                    self.skip_word();
                    None
                }
            };
            if let Some(object) = open {
                if depth == DEPTH {
                    return self.fail();
                }
                depth += 1;
                objects = objects << 1 | object;
                if object == 1 {
                    self.key();
                }
                continue;
            }
            while depth > 0 {
                match (self.peek(), objects & 1 == 1) {
                    (b',', object) => {
                        self.at += 1;
                        if object {
                            self.key();
                        }
                        break;
                    }
                    (b'}', true) | (b']', false) => {
                        self.at += 1;
                        depth -= 1;
                        objects >>= 1;
                    }
                    _ => return self.fail(),
                }
            }
            if depth == 0 {
                return;
            }
        }
    }

    /// Takes the opening; whether there is something in it. If not, the closing is taken, too.
    #[inline]
    fn opened(&mut self, close: u8) -> bool {
        self.at += 1;
        let empty = self.peek() == close;
        self.at += usize::from(empty);
        !empty
    }

    /// A key and its colon.
    #[inline]
    fn key(&mut self) -> Str<'a> {
        if self.peek() != b'"' {
            self.fail();
            return Str::default();
        }
        let key = self.string();
        if self.peek() == b':' {
            self.at += 1;
        } else {
            self.fail();
        }
        key
    }

    /// A string, whose opening quote is next.
    pub(super) fn string(&mut self) -> Str<'a> {
        let start = self.at + 1;
        let (mut at, mut escaped) = (start, false);
        while let Some(found) = self.text.get(at..).and_then(stop) {
            at += found;
            if self.text[at] == b'"' {
                self.at = at + 1;
                return Str { raw: &self.text[start..at], escaped };
            }
            escaped = true;
            at += 2;
        }
        self.at = self.text.len();
        self.fail();
        Str::default()
    }

    /// A value that is neither a string nor nested.
    fn skip_word(&mut self) {
        match self.peek() {
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => _ = self.digits(),
        }
    }

    fn word(&mut self, word: &[u8]) {
        let rest = self.rest();
        if rest.starts_with(word) {
            self.at += word.len();
            return;
        }
        if word.starts_with(rest) {
            self.at = self.text.len();
        }
        self.fail();
    }

    /// A number, as it is written.
    fn digits(&mut self) -> &'a [u8] {
        let start = self.at;
        self.at += usize::from(self.text.get(start) == Some(&b'-'));
        let zero = self.text.get(self.at) == Some(&b'0');
        if self.run() > 1 && zero {
            self.fail();
        }
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            self.run();
        }
        if let Some(b'e' | b'E') = self.text.get(self.at) {
            self.at += 1;
            self.at += usize::from(matches!(self.text.get(self.at), Some(b'+' | b'-')));
            self.run();
        }
        self.since(start)
    }

    /// At least one digit.
    #[inline]
    fn run(&mut self) -> usize {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.text.get(self.at) {
            self.at += 1;
        }
        let digits = self.at - start;
        if digits == 0 {
            self.fail();
        }
        digits
    }

    /// What is next is not what was promised. Null is how JSON says absent: nothing wrong with it.
    #[cold]
    fn wrong(&mut self) {
        if self.peek() != b'n' {
            self.misshapen = self.misshapen.saturating_add(1);
        }
        self.skip();
    }

    #[inline]
    pub(super) fn text(&mut self) -> Option<Str<'a>> {
        if self.peek() == b'"' {
            Some(self.string())
        } else {
            self.wrong();
            None
        }
    }

    /// A name or an id, cut to what any has.
    pub(super) fn name(&mut self) -> Option<String> {
        self.text().map(Str::name)
    }

    /// Whether the text is this one.
    pub(super) fn is(&mut self, word: &[u8]) -> bool {
        self.text().is_some_and(|text| *text.bytes() == *word)
    }

    /// A count: whole and not negative. JavaScript writes some as floats.
    pub(super) fn count(&mut self) -> Option<u64> {
        let (start, mut n) = (self.at, 0u64);
        let first = self.peek();
        if !matches!(first, b'-' | b'0'..=b'9') {
            self.wrong();
            return None;
        }
        while let Some(digit @ b'0'..=b'9') = self.text.get(self.at) {
            n = n.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            self.at += 1;
        }
        let digits = self.at - start;
        // Nineteen digits fit.
        let plain = !matches!(self.text.get(self.at), Some(b'.' | b'e' | b'E'));
        if plain && (digits == 1 || digits > 1 && digits < 20 && first != b'0') {
            return Some(n);
        }
        self.at = start;
        let digits = std::str::from_utf8(self.digits()).unwrap_or_default();
        let whole = || digits.parse().ok().filter(|n| (0.0..18_446_744_073_709_551_616.0).contains(n));
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
        let count = digits.parse().ok().or_else(|| whole().map(|n: f64| n as u64));
        self.misshapen += u32::from(count.is_none());
        count
    }

    /// A finite number.
    pub(super) fn number(&mut self) -> Option<f64> {
        if !matches!(self.peek(), b'-' | b'0'..=b'9') {
            self.wrong();
            return None;
        }
        let number = float(self.digits());
        self.misshapen += u32::from(number.is_none());
        number
    }

    /// A finite number that is not negative.
    pub(super) fn amount(&mut self) -> Option<f64> {
        let number = self.number();
        let amount = number.filter(|n| *n >= 0.0);
        self.misshapen += u32::from(number.is_some() && amount.is_none());
        amount
    }

    pub(super) fn flag(&mut self) -> Option<bool> {
        match self.peek() {
            b't' => {
                self.word(b"true");
                Some(true)
            }
            b'f' => {
                self.word(b"false");
                Some(false)
            }
            _ => {
                self.wrong();
                None
            }
        }
    }

    /// An object's fields; a value that `each` leaves alone is skipped. Whether it was an object.
    #[inline]
    pub(super) fn object(&mut self, mut each: impl FnMut(&[u8], &mut Json<'a>)) -> bool {
        let object = self.peek() == b'{';
        if object {
            self.entries(|key, json| each(&key.bytes(), json));
        } else {
            self.wrong();
        }
        object
    }

    /// The same where something else is nothing wrong, only of no interest.
    pub(super) fn object_if_any(&mut self, each: impl FnMut(&[u8], &mut Json<'a>)) -> bool {
        if self.peek() == b'{' {
            return self.object(each);
        }
        self.skip();
        false
    }

    /// The same with the keys as they are written. An object must be next.
    #[inline]
    pub(super) fn entries(&mut self, mut each: impl FnMut(Str<'a>, &mut Json<'a>)) {
        let mut next = self.first_key();
        while let Some(key) = next {
            self.value(|json| each(key, json));
            next = self.next_key();
        }
    }

    /// The value of a key; skipped, if `read` leaves it alone.
    #[inline]
    pub(super) fn value(&mut self, read: impl FnOnce(&mut Json<'a>)) {
        self.peek();
        let start = self.at;
        read(self);
        if self.at == start {
            self.skip();
        }
    }

    /// Enters an object, which must be next.
    #[inline]
    pub(super) fn first_key(&mut self) -> Option<Str<'a>> {
        self.opened(b'}').then(|| self.key())
    }

    /// Behind a value: the next key, or the end of the object.
    #[inline]
    pub(super) fn next_key(&mut self) -> Option<Str<'a>> {
        match self.peek() {
            b',' => {
                self.at += 1;
                Some(self.key())
            }
            b'}' => {
                self.at += 1;
                None
            }
            _ => {
                self.fail();
                None
            }
        }
    }

    /// A list's elements; one that `each` leaves alone is skipped. Whether it was a list.
    pub(super) fn list(&mut self, mut each: impl FnMut(&mut Json<'a>)) -> bool {
        if self.peek() != b'[' {
            self.wrong();
            return false;
        }
        if !self.opened(b']') {
            return true;
        }
        loop {
            self.value(&mut each);
            match self.peek() {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return true;
                }
                _ => {
                    self.fail();
                    return true;
                }
            }
        }
    }
}

fn float(digits: &[u8]) -> Option<f64> {
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|n: &f64| n.is_finite())
}

/// Where the next quote or backslash is.
#[inline]
fn stop(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::MAX / 0xFF;
    const HIGH: u64 = ONES << 7;
    // The lowest bit that is left marks the first byte that is zero.
    let zeroes = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
    // Keys, names and ids end within a few words; the wide search is worth its start only behind them.
    let mut rest = bytes;
    for _ in 0..6 {
        let Some((word, behind)) = rest.split_first_chunk::<8>() else { break };
        let word = u64::from_le_bytes(*word);
        let found = zeroes(word ^ (ONES * b'"' as u64)) | zeroes(word ^ (ONES * b'\\' as u64));
        if found != 0 {
            return Some(bytes.len() - rest.len() + found.trailing_zeros() as usize / 8);
        }
        rest = behind;
    }
    memchr2(b'"', b'\\', rest).map(|found| bytes.len() - rest.len() + found)
}

/// A string as it is written, without its quotes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Str<'a> {
    pub(super) raw: &'a [u8],
    pub(super) escaped: bool,
}

impl<'a> Str<'a> {
    /// The text, as bytes.
    #[inline]
    pub(super) fn bytes(self) -> Cow<'a, [u8]> {
        if self.escaped { Cow::Owned(self.decoded(usize::MAX)) } else { Cow::Borrowed(self.raw) }
    }

    /// A name or an id: at most as much as any has.
    pub(super) fn name(self) -> String {
        self.cut(NAME)
    }

    pub(super) fn cut(self, max: usize) -> String {
        let decoded;
        let bytes = if self.escaped {
            decoded = self.decoded(max);
            &decoded[..]
        } else {
            // A character that begins within is whole.
            &self.raw[..self.raw.len().min(max + 3)]
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => crate::metric::bounded(text, max).to_owned(),
            Err(_) => crate::metric::bounded(&String::from_utf8_lossy(bytes), max).to_owned(),
        }
    }

    /// How many bytes the text has.
    pub(super) fn len(self) -> usize {
        let mut len = 0;
        self.pieces(|piece| {
            len += piece.len();
            true
        });
        len
    }

    /// The text, or a little more than `enough` of it.
    fn decoded(self, enough: usize) -> Vec<u8> {
        let mut out = Vec::new();
        self.pieces(|piece| {
            out.extend_from_slice(&piece[..piece.len().min(enough.saturating_add(3).saturating_sub(out.len()))]);
            out.len() < enough
        });
        out
    }

    /// The text piece by piece, as long as `take` wants more. What is no escape is the character that stands for what cannot be read.
    fn pieces(self, mut take: impl FnMut(&[u8]) -> bool) {
        let mut rest = self.raw;
        while let Some(at) = self.escaped.then(|| memchr(b'\\', rest)).flatten() {
            let (head, tail) = rest.split_at(at);
            if !head.is_empty() && !take(head) {
                return;
            }
            let (c, used) = escape(tail);
            if !take(c.encode_utf8(&mut [0; 4]).as_bytes()) {
                return;
            }
            rest = tail.get(used..).unwrap_or_default();
        }
        if !rest.is_empty() {
            take(rest);
        }
    }
}

/// The character of the escape that the bytes begin with, and how long the escape is.
fn escape(bytes: &[u8]) -> (char, usize) {
    let c = match bytes.get(1) {
        Some(b'n') => '\n',
        Some(b't') => '\t',
        Some(b'r') => '\r',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(c @ (b'"' | b'\\' | b'/')) => char::from(*c),
        Some(b'u') => {
            let Some(first) = unit(bytes) else { return (char::REPLACEMENT_CHARACTER, 2) };
            if let Some(c) = char::from_u32(first) {
                return (c, 6);
            }
            // Half a pair: it needs the other one.
            let pair = bytes.get(6..).and_then(unit).filter(|second| first < 0xDC00 && (0xDC00..0xE000).contains(second));
            return pair.map_or((char::REPLACEMENT_CHARACTER, 6), |second| {
                let c = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
                (char::from_u32(c).unwrap_or(char::REPLACEMENT_CHARACTER), 12)
            });
        }
        _ => char::REPLACEMENT_CHARACTER,
    };
    (c, 2)
}

/// The number in `\uXXXX`.
fn unit(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    digits.iter().try_fold(0, |n, digit| Some(n << 4 | char::from(*digit).to_digit(16)?))
}
