//! Ends of byte streams that never block the relay, and never change a description that others share.
//!
//! O_NONBLOCK belongs to the open file description, and the app (or a shell, or a log driver) holds the same one: setting it there
//! would make *their* reads and writes fail. So a pipe or a terminal is opened once more through /proc, a socket is used with
//! MSG_DONTWAIT, and where neither works poll(2) is asked before each small step.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// A blocking pipe that poll(2) calls writable takes this much without blocking.
const PIPE_BUF: usize = 4096;

/// One end of a stream.
#[derive(Debug)]
pub(crate) struct End {
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A description of our own, with O_NONBLOCK.
    Nonblocking,
    Socket,
    /// Shared and blocking, but poll(2) says when it will not: a pipe or terminal that could not be opened again.
    Polled,
    /// Never blocks for long and poll(2) has nothing to say: a file, /dev/null.
    Plain,
}

/// What came of a step.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Moved(usize),
    NotNow,
    /// The end of what can be read; nobody reads any more.
    Ended,
    /// It cannot be written, whoever reads: a full disk, a file that is as large as it may be.
    Refused(Errno),
}

impl End {
    /// Our own end of a pipe that we made: the other end is another description.
    pub(crate) fn own(fd: OwnedFd) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { fd, kind: Kind::Nonblocking })
    }

    /// A descriptor that we were given and that others may share.
    pub(crate) fn given(fd: BorrowedFd<'_>, access: OFlags) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let polled = match kind {
            FileType::Socket => return Ok(Self { fd: copy(fd)?, kind: Kind::Socket }),
            FileType::Fifo => true,
            FileType::CharacterDevice => rustix::termios::isatty(fd),
            _ => false,
        };
        if !polled {
            return Ok(Self { fd: copy(fd)?, kind: Kind::Plain });
        }
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        match rustix::fs::open(path, flags, rustix::fs::Mode::empty()) {
            Ok(fd) => Ok(Self { fd, kind: Kind::Nonblocking }),
            // No /proc, somebody else's pipe (another user made it), or no reader any more: poll(2) will say.
            Err(_) => Ok(Self { fd: copy(fd)?, kind: Kind::Polled }),
        }
    }

    pub(crate) fn read(&self, buf: &mut [u8]) -> Step {
        match self.kind {
            Kind::Nonblocking | Kind::Polled | Kind::Plain => taken(rustix::io::read(&self.fd, buf)),
            Kind::Socket => taken(rustix::net::recv(&self.fd, buf, RecvFlags::DONTWAIT).map(|(n, _)| n)),
        }
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> Step {
        let result = match self.kind {
            Kind::Nonblocking | Kind::Plain => rustix::io::write(&self.fd, bytes),
            Kind::Socket => rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Polled => {
                let mut poll = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::OUT)];
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                match rustix::event::poll(&mut poll, Some(&now)) {
                    Ok(0) => Err(Errno::AGAIN),
                    Ok(_) => rustix::io::write(&self.fd, &bytes[..bytes.len().min(PIPE_BUF)]),
                    Err(errno) => Err(errno),
                }
            }
        };
        match result {
            Ok(n) => Step::Moved(n),
            Err(Errno::AGAIN | Errno::INTR) => Step::NotNow,
            // The last one is a terminal's that hung up.
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::IO) => Step::Ended,
            Err(errno) => Step::Refused(errno),
        }
    }
}

impl AsFd for End {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn taken(result: rustix::io::Result<usize>) -> Step {
    match result {
        Ok(n) if n > 0 => Step::Moved(n),
        Err(Errno::AGAIN | Errno::INTR) => Step::NotNow,
        // A terminal that hung up says EIO.
        Ok(_) | Err(_) => Step::Ended,
    }
}

fn copy(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}
