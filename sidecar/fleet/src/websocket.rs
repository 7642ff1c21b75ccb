//! What of a WebSocket is looked at while it is passed through: whether somebody says something, and where it may be ended with a reason (RFC 6455).

/// Going away.
const CODE: u16 = 1001;
const CLOSE: u8 = 8;
/// Pings, pongs and closes have this bit.
const CONTROL: u8 = 8;

/// Where in its frames one direction is.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// What there is of a frame's head.
    head: Vec<u8>,
    /// What is missing of its payload.
    left: u64,
    control: bool,
    closed: bool,
}

impl Frames {
    /// Goes on. Whether something was said: a ping, which many clients send by themselves, says nothing.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> bool {
        let mut said = false;
        while !bytes.is_empty() {
            if self.left > 0 {
                let n = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
                self.left -= n as u64;
                bytes = &bytes[n..];
                said |= !self.control;
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if let Some((op, length)) = head(&self.head) {
                (self.control, self.left) = (op & CONTROL != 0, length);
                self.closed |= op == CLOSE;
                said |= !self.control;
                self.head.clear();
            }
        }
        said
    }

    /// Whether a frame of ours may come now.
    pub(crate) fn is_between(&self) -> bool {
        self.head.is_empty() && self.left == 0 && !self.closed
    }
}

/// What a whole head says: what it is of, and how long that is.
fn head(head: &[u8]) -> Option<(u8, u64)> {
    let (first, second) = (*head.first()?, *head.get(1)?);
    let extended = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    let long = head.get(2..2 + extended).filter(|_| head.len() == 2 + extended + mask)?;
    let length = long.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
    Some((first & 0x0f, if extended == 0 { u64::from(second & 0x7f) } else { length }))
}

/// The last frame: of a server, or of a client, who masks what it says.
pub(crate) fn close(why: &str, mask: Option<[u8; 4]>) -> Vec<u8> {
    // A control frame has at most 125 bytes.
    let said = [&CODE.to_be_bytes()[..], &why.as_bytes()[..why.len().min(123)]].concat();
    let length = u8::try_from(said.len()).unwrap_or_default();
    let mut frame = vec![0x80 | CLOSE, length | if mask.is_some() { 0x80 } else { 0 }];
    frame.extend(mask.iter().flatten());
    frame.extend(said.iter().zip(mask.unwrap_or_default().iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, length: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![first];
        match u16::try_from(length) {
            Ok(short @ 0..126) => frame.push(mask | u8::try_from(short).unwrap()),
            Ok(long) => {
                frame.push(mask | 126);
                frame.extend(long.to_be_bytes());
            }
            Err(_) => {
                frame.push(mask | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(vec![0x89; length + if masked { 4 } else { 0 }]);
        frame
    }

    #[test]
    fn a_text_says_something_and_a_ping_does_not_however_it_comes() {
        for length in [0, 1, 125, 126, 65_535, 65_536] {
            for masked in [false, true] {
                for (first, says) in [(0x81, true), (0x02, true), (0x80, true), (0xc1, true), (0x89, false), (0x8a, false)] {
                    let bytes = frame(first, length, masked);
                    for piece in [1, 7, bytes.len()] {
                        let mut frames = Frames::default();
                        let said = bytes.chunks(piece).fold(false, |said, chunk| said | frames.read(chunk));
                        assert_eq!((said, frames.is_between()), (says, true), "{first:x} {length} {masked} {piece}");
                    }
                    let mut cut = Frames::default();
                    cut.read(&bytes[..bytes.len() - 1]);
                    assert!(!cut.is_between(), "{first:x} {length} {masked}");
                }
            }
        }
    }

    #[test]
    fn what_is_closed_is_not_closed_again() {
        let mut frames = Frames::default();
        let bytes = close("enough", None);
        assert_eq!(bytes, b"\x88\x08\x03\xe9enough");
        assert!(!frames.read(&bytes) && !frames.is_between());
        assert_eq!(close(&"x".repeat(200), None).len(), 127);
        let masked = close("ab", Some([1, 2, 3, 4]));
        assert_eq!(masked, [0x88, 0x84, 1, 2, 3, 4, 0x03 ^ 1, 0xe9 ^ 2, b'a' ^ 3, b'b' ^ 4]);
        let mut frames = Frames::default();
        assert!(!frames.read(&masked) && !frames.is_between());
    }
}
