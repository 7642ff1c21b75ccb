//! Files in places where the agent may have been before us. A pipe that nobody writes to must keep nobody waiting, a link must not lead
//! elsewhere, and what has no end must not fill the memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Many times what we or the CLI write into one.
const LARGEST: u64 = 64 * 1024 * 1024;

/// A file, and nothing else that has this name.
pub(crate) fn open(path: &Path, how: &mut OpenOptions) -> io::Result<File> {
    file(how.custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed()).open(path)?)
}

/// That it is this one's own, and not somebody else's by a second name: what was opened where others may write.
pub(crate) fn check_owner(file: &File, owner: Option<u32>) -> io::Result<()> {
    let Some(owner) = owner else { return Ok(()) };
    if file.metadata()?.uid() == owner {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is another user's"))
}

/// All of such a file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    all(open(path, OpenOptions::new().read(true))?)
}

pub(crate) fn read_to_string(path: &Path) -> io::Result<String> {
    text(read(path)?)
}

/// The same, at the end of whatever links somebody has made: theirs to make.
pub(crate) fn read_linked(path: &Path) -> io::Result<String> {
    let opened = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    text(all(file(opened)?)?)
}

/// Puts this in the place of what is there, if that is a file.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = open(path, OpenOptions::new().write(true).create(true).truncate(true))?;
    file.write_all(bytes)
}

fn file(opened: File) -> io::Result<File> {
    if opened.metadata()?.is_file() { Ok(opened) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file")) }
}

fn all(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if file.take(LARGEST + 1).read_to_end(&mut bytes)? as u64 > LARGEST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large"));
    }
    Ok(bytes)
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_no_file_or_has_no_end_is_an_error_at_once() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-files-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let [plain, link, pipe, endless] = ["plain", "link", "pipe", "endless"].map(|name| dir.join(name));
        fs::write(&plain, "text").unwrap();
        std::os::unix::fs::symlink(&plain, &link).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        File::create(&endless).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(read_to_string(&plain).unwrap(), "text");
        assert_eq!(read_linked(&link).unwrap(), "text");
        for path in [&link, &pipe, &endless, &dir] {
            assert!(read(path).is_err(), "{}", path.display());
        }
        for path in [&link, &pipe] {
            assert!(open(path, OpenOptions::new().write(true)).is_err(), "{}", path.display());
            assert!(open(path, OpenOptions::new().append(true).create(true)).is_err(), "{}", path.display());
        }
        assert!(read_linked(&pipe).is_err());
        fs::remove_dir_all(dir).unwrap();
    }
}
