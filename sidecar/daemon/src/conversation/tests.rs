use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

use super::*;

const MOST: u64 = 1 << 20;

/// A container's directories, which go with the test.
struct Place {
    dir: PathBuf,
    roots: Vec<Root>,
}

impl Place {
    fn new(name: &str) -> Place {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-conversation-{}-{name}", std::process::id()));
        fs::remove_dir_all(&dir).ok();
        // The config directory is in the workspace, as it is where that is the home.
        fs::create_dir_all(dir.join("home/.claude/projects/-home")).unwrap();
        let dir = dir.canonicalize().unwrap();
        let root = |name, path: &str| Root { name, path: dir.join(path) };
        let roots = vec![root("config", "home/.claude"), root("workspace", "home")];
        Place { dir, roots }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.join("home").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn pack(&self, without: &[&str], most: u64) -> Result<Vec<u8>, Wrong> {
        let (names, mut out) = (names(without), Vec::new());
        let opened = Opened::open(&self.roots)?;
        opened.measure(&names, most)?;
        opened.pack(&names, most, &mut out)?;
        Ok(out)
    }

    fn unpack(&self, without: &[&str], from: impl Read) -> Result<(), Wrong> {
        let names = names(without);
        let mut unpacker = Unpacker::new(&self.roots, &names, MOST);
        unpacker.read(from)?;
        unpacker.finish()
    }

    /// All there is, with what is in it.
    fn all(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut dirs = vec![self.dir.join("home")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                let about = path.symlink_metadata().unwrap();
                let name = path.strip_prefix(self.dir.join("home")).unwrap().display().to_string();
                if about.is_dir() {
                    dirs.push(path);
                } else if about.is_symlink() {
                    all.insert(name, format!("-> {}", fs::read_link(path).unwrap().display()));
                } else if about.is_file() {
                    all.insert(name, fs::read_to_string(path).unwrap());
                }
            }
        }
        all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).ok();
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

fn is(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn a_conversation_is_elsewhere_what_it_was() {
    let (from, to) = (Place::new("from"), Place::new("to"));
    let long = format!("a/{}/deep", "long-name-".repeat(20));
    for (path, text) in
        [(".claude/projects/-home/s.jsonl", "said"), ("code/run", "#!"), (&long, "x"), ("secret/key", "k"), ("empty", "")]
    {
        from.write(path, text);
    }
    fs::set_permissions(from.dir.join("home/code/run"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::set_permissions(from.dir.join("home/code"), fs::Permissions::from_mode(0o555)).unwrap();
    symlink("run", from.dir.join("home/code/same")).unwrap();
    symlink("/etc", from.dir.join("home/outside")).unwrap();
    let _socket = UnixListener::bind(from.dir.join("home/socket")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, from.dir.join("home/pipe"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    // What the image has there goes, but for what is no part of it.
    for (path, text) in [(".claude/settings.json", "of the image"), ("old", "of the image"), ("secret/key", "theirs")] {
        to.write(path, text);
    }
    let tar = from.pack(&["secret"], MOST).unwrap();
    to.unpack(&["secret"], &tar[..]).unwrap();
    let expected = is(&[
        (".claude/projects/-home/s.jsonl", "said"),
        ("code/run", "#!"),
        ("code/same", "-> run"),
        (&long, "x"),
        ("empty", ""),
        ("outside", "-> /etc"),
        ("secret/key", "theirs"),
    ]);
    assert_eq!(to.all(), expected);
    let mode = |path: &str| to.dir.join("home").join(path).metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        (mode("code/run"), mode("code")),
        (0o750, 0o555),
        "as it was, without the bit that makes somebody else of who runs it"
    );
    for place in [&from, &to] {
        fs::set_permissions(place.dir.join("home/code"), fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert_eq!(newest(&to.roots).as_deref(), Some("s"));
}

#[test]
fn what_is_too_large_is_not_begun() {
    let from = Place::new("large");
    from.write("big", &"x".repeat(4000));
    assert!(from.pack(&[], 16 * 1024).is_ok());
    assert!(matches!(from.pack(&[], 4096), Err(Wrong::Large(_))));
    let tar = from.pack(&[], MOST).unwrap();
    let names = Vec::new();
    let mut unpacker = Unpacker::new(&from.roots, &names, 10);
    let long = tar.chain(io::repeat(0)).take(1 << 20);
    assert!(unpacker.read(long).is_err(), "it has no end");
}

/// A tar of one entry.
fn tar_of(kind: tar::EntryType, path: &str, link: Option<&str>) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    // As somebody would write it who means harm: the builder refuses to.
    header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
    if let Some(link) = link {
        header.as_gnu_mut().unwrap().linkname[..link.len()].copy_from_slice(link.as_bytes());
    }
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(if kind == tar::EntryType::Regular { 4 } else { 0 });
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    if kind == tar::EntryType::Regular {
        out.extend_from_slice(b"evil");
        out.resize(1024, 0);
    }
    out
}

#[test]
fn what_leads_out_or_is_not_all_there_changes_nothing() {
    use tar::EntryType::{Block, Directory, Link, Regular, Symlink};
    let to = Place::new("out");
    to.write("kept", "as it was");
    let before = to.all();
    let end = vec![0; 1024];
    let outside = to.dir.join("outside");
    fs::create_dir(&outside).unwrap();
    let through = [tar_of(Symlink, "workspace/way", outside.to_str()), tar_of(Regular, "workspace/way/evil", None)];
    let again = [tar_of(Regular, "workspace/a", None), tar_of(Regular, "workspace/a", None)];
    let cases: Vec<Vec<Vec<u8>>> = vec![
        vec![tar_of(Regular, "../evil", None)],
        vec![tar_of(Regular, "workspace/../../evil", None)],
        vec![tar_of(Regular, "/evil", None)],
        vec![tar_of(Regular, "evil", None)],
        vec![tar_of(Regular, "workspace", None)],
        vec![tar_of(Link, "workspace/evil", Some("/etc/passwd"))],
        vec![tar_of(Block, "workspace/evil", None)],
        through.to_vec(),
        again.to_vec(),
        // Of two roots, one is right.
        vec![tar_of(Regular, "config/settings.json", None), tar_of(Directory, "elsewhere", None)],
    ];
    for (n, mut case) in cases.into_iter().enumerate() {
        case.push(end.clone());
        assert!(to.unpack(&[], &case.concat()[..]).is_err(), "{n}");
        assert_eq!(to.all(), before, "{n}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nothing is written through a link");
    assert!(!to.dir.join("evil").exists());
    let whole = [tar_of(Regular, "workspace/new", None), end].concat();
    for cut in (0..whole.len()).step_by(256) {
        assert!(to.unpack(&[], &whole[..cut]).is_err(), "{cut}");
        assert_eq!(to.all(), before, "{cut}");
    }
    to.unpack(&[], &whole[..]).unwrap();
    assert_eq!(to.all(), is(&[("new", "evil")]));
}

#[test]
fn a_start_waits_for_its_own_conversation_and_not_for_ever() {
    let dir = std::env::temp_dir().join(format!("agent-sidecar-fetched-{}", std::process::id()));
    let (hub, wrapper) = (Fetched::new(Some(dir.clone())), Fetched::new(Some(dir.clone())));
    let go_on = AtomicBool::new(false);
    assert!(!wrapper.wait("one-2", Duration::ZERO, &go_on));
    hub.say("one-1").unwrap();
    assert!(!wrapper.wait("one-2", Duration::ZERO, &go_on), "that was brought into the container before");
    hub.say("one-2").unwrap();
    assert!(wrapper.wait("one-2", Duration::from_secs(3600), &go_on));
    assert!(!Fetched::default().wait("one-2", Duration::from_secs(3600), &AtomicBool::new(true)));
    fs::remove_file(dir).unwrap();
}
