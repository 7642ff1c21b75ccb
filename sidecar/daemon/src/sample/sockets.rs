//! The TCP connections of one process: its descriptors name sockets, and a table of the kernel says how those are.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use agent_sidecar_core::sample::Sockets;

const ESTABLISHED: &str = "01";
const CONNECTING: &str = "02";
/// Sent again and again without an answer: one retry is daily business.
const RETRIES: u32 = 2;

/// Absent where the kernel does not say.
pub(super) fn read(process: &Path) -> Option<Sockets> {
    let own: HashSet<u64> = fs::read_dir(process.join("fd"))
        .ok()?
        .flatten()
        .filter_map(|entry| inode(fs::read_link(entry.path()).ok()?.to_str()?))
        .collect();
    let four = fs::read_to_string(process.join("net/tcp")).ok()?;
    // Where there is no IPv6 there is no such file.
    let six = fs::read_to_string(process.join("net/tcp6")).unwrap_or_default();
    let mut sockets = Sockets::default();
    for line in four.lines().chain(six.lines()) {
        count(line, &own, &mut sockets);
    }
    Some(sockets)
}

/// `socket:[123]`
fn inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// `sl local remote st tx:rx timer:when retries uid timeout inode …`
fn count(line: &str, own: &HashSet<u64>, sockets: &mut Sockets) -> Option<()> {
    let mut fields = line.split_ascii_whitespace().skip(3);
    let state = fields.next()?;
    let unsent = fields.next()?.split_once(':')?.0.bytes().any(|digit| digit != b'0');
    let retries = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
    if !own.contains(&fields.nth(2)?.parse().ok()?) {
        return None;
    }
    match state {
        ESTABLISHED => {
            sockets.established += 1;
            sockets.unanswered += u32::from(unsent && retries >= RETRIES);
        }
        CONNECTING => sockets.connecting += 1,
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn ones_own_connections_are_counted_and_no_others() {
        let before = read(Path::new("/proc/self")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let other = listener.accept().unwrap();
        // Other tests of this process open some, too.
        let now = read(Path::new("/proc/self")).unwrap();
        assert!(now.established >= 2 && now.working() >= 2, "{before:?} {now:?}");
        drop((one, other));
        assert_eq!(inode("socket:[17]"), Some(17));
        assert_eq!(inode("pipe:[17]"), None);
    }

    #[test]
    fn a_connection_that_nobody_answers_is_told_apart() {
        let mut sockets = Sockets::default();
        let own = HashSet::from([77]);
        for line in [
            "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode",
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 77 1 0 100 0 0 10 0",
            "   1: 0100007F:1F90 0100007F:C000 01 00000000:00000000 02:00000000 00000000     0        0 77 1 0 20 4 30 10 -1",
            "   2: 0100007F:1F90 0100007F:C001 01 000000F4:00000000 01:00000014 00000003     0        0 77 2 0 20 4 30 10 -1",
            "   3: 0100007F:1F90 0100007F:C002 01 000000F4:00000000 01:00000014 00000000     0        0 77 2 0 20 4 30 10 -1",
            "   4: 0100007F:1F90 0100007F:C003 02 00000001:00000000 01:00000014 00000002     0        0 77 2 0 20 4 30 10 -1",
            "   5: 0100007F:1F90 0100007F:C004 01 00000000:00000000 00:00000000 00000000     0        0 78 2 0 20 4 30 10 -1",
            "   6: cut off",
        ] {
            count(line, &own, &mut sockets);
        }
        assert_eq!(sockets, Sockets { established: 3, connecting: 1, unanswered: 1 });
    }
}
