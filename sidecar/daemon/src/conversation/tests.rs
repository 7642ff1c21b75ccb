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
    run("touch -hd @1000000000 code/same code .claude/projects code/run", &from.dir.join("home"));
    let tar = from.pack(&["secret"], MOST).unwrap();
    to.unpack(&["secret"], &tar[..]).unwrap();
    for path in ["code/same", "code", ".claude/projects", "code/run"] {
        use std::os::unix::fs::MetadataExt;
        assert_eq!(to.dir.join("home").join(path).symlink_metadata().unwrap().mtime(), 1_000_000_000, "{path}");
    }
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
    let newest = |place: &Place| written(&place.roots).newest;
    assert_eq!(newest(&to), None);
    let session = "0b5d7a52-3c1e-4a6f-9d53-1f0c2f7be001";
    to.write(&format!(".claude/projects/-home/{session}.jsonl"), "said");
    to.write(".claude/projects/-home/agent-0b5d7a52-3c1e-4a6f-9d53-1f0c2f7.jsonl", "said later by a subagent");
    assert_eq!(newest(&to).as_deref(), Some(session));
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
        // Found when all is in its place.
        TWICE.map(|(kind, path)| tar_of(kind, path, None)).to_vec(),
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

/// A file that is a directory, too.
const TWICE: [(tar::EntryType, &str); 3] = [
    (tar::EntryType::Regular, "workspace/kept"),
    (tar::EntryType::Regular, "workspace/both"),
    (tar::EntryType::Directory, "workspace/both"),
];

/// Whether this is the test in namespaces of its own: it is run again in them.
fn inside(flags: &[&str], test: &str) -> bool {
    const INSIDE: &str = "AGENT_SIDECAR_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let unshare = || std::process::Command::new("unshare");
    if !unshare().args(flags).arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("no namespaces here: not tried");
        return false;
    }
    let mut again = unshare();
    again.args(flags).arg(std::env::current_exe().unwrap()).args(["--nocapture", "--exact"]);
    let output = again.arg(format!("conversation::tests::{test}")).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    false
}

fn mounting() -> &'static [&'static str] {
    if rustix::process::geteuid().is_root() { &["-m"] } else { &["-Urm"] }
}

fn run(line: &str, at: &Path) {
    let done = std::process::Command::new("sh").arg("-ec").arg(line).current_dir(at).status().unwrap();
    assert!(done.success(), "{line}");
}

#[test]
fn what_is_mounted_stays_with_all_that_is_in_it() {
    if !inside(mounting(), "what_is_mounted_stays_with_all_that_is_in_it") {
        return;
    }
    let (from, to) = (Place::new("unmounted"), Place::new("mounted"));
    for (path, text) in [("data/new", "new"), ("data/a vol/theirs", "not here"), ("env", "theirs"), ("bound/theirs", "not here")]
    {
        from.write(path, text);
    }
    for path in ["data/a vol/-", "data/old", "other/deep/vol/-", "other/old", "env", "bound/-"] {
        to.write(path, "of the image");
    }
    let home = to.dir.join("home");
    run("mount -t tmpfs none 'data/a vol'; mount -t tmpfs none other/deep/vol; mkdir ../vol; touch ../of", &home);
    // One of the same file system is one, too.
    run("mount --bind ../of env; mount --bind ../vol bound", &home);
    to.write("data/a vol/kept", "kept");
    to.write("bound/kept", "kept");
    to.write("other/deep/vol/kept", "kept");
    let before = to.all();
    let twice = TWICE.map(|(kind, path)| tar_of(kind, path, None)).concat();
    assert!(to.unpack(&[], &[twice, vec![0; 1024]].concat()[..]).is_err());
    assert_eq!(to.all(), before);
    let tar = from.pack(&[], MOST).unwrap();
    to.unpack(&[], &tar[..]).unwrap();
    let expected = is(&[
        ("data/a vol/kept", "kept"),
        ("data/new", "new"),
        ("env", ""),
        ("bound/kept", "kept"),
        ("other/deep/vol/kept", "kept"),
    ]);
    assert_eq!(to.all(), expected);
    run("umount 'data/a vol' other/deep/vol env bound", &home);
}

#[test]
fn what_an_image_has_in_another_layer_makes_room() {
    if !inside(mounting(), "what_an_image_has_in_another_layer_makes_room") {
        return;
    }
    let (from, to) = (Place::new("unlayered"), Place::new("layered"));
    from.write("repo/src/new", "new");
    from.write("was-a-directory", "file");
    fs::set_permissions(from.dir.join("home/repo"), fs::Permissions::from_mode(0o750)).unwrap();
    let tar = from.pack(&[], MOST).unwrap();
    let home = to.dir.join("home");
    run(
        "mkdir layers; mount -t tmpfs none layers; cd layers; mkdir -p lower/.claude lower/repo/src/deep lower/was-a-directory/a/b lower/gone/a upper work",
        &to.dir,
    );
    run("cd layers/lower; for at in repo/a repo/src/deep/a was-a-directory/a/b/c gone/a/b; do echo image >$at; done", &to.dir);
    run("cd layers; mount -t overlay none -o lowerdir=lower,upperdir=upper,workdir=work,redirect_dir=off ../home", &to.dir);
    let renamed = fs::rename(home.join("gone"), home.join("else"));
    assert_eq!(renamed.unwrap_err().kind(), io::ErrorKind::CrossesDevices, "it is a layer");
    let before = to.all();
    let twice = TWICE.map(|(kind, path)| tar_of(kind, path, None)).concat();
    assert!(to.unpack(&[], &[twice, vec![0; 1024]].concat()[..]).is_err());
    assert_eq!(to.all(), before);
    to.unpack(&[], &tar[..]).unwrap();
    assert_eq!(to.all(), is(&[("repo/src/new", "new"), ("was-a-directory", "file")]));
    assert_eq!(home.join("repo").metadata().unwrap().permissions().mode() & 0o777, 0o750);
    assert!(!home.join("gone").exists());
    run("umount home layers", &to.dir);
}

#[test]
fn a_root_that_is_deep_in_another_is_not_lost_with_what_is_around_it() {
    let deep = |name: &str| {
        let mut place = Place::new(name);
        place.roots[0].path = place.dir.join("home/.config/claude");
        fs::create_dir_all(&place.roots[0].path).unwrap();
        place
    };
    let (from, to) = (deep("deep-from"), deep("deep-to"));
    from.write(".config/claude/projects/-home/s.jsonl", "said");
    from.write(".config/git", "new");
    to.write(".config/claude/settings.json", "of the image");
    to.write(".config/old", "of the image");
    let tar = from.pack(&[], MOST).unwrap();
    to.unpack(&[], &tar[..]).unwrap();
    assert_eq!(to.all(), from.all());
    // Also where nothing comes for it.
    to.unpack(&[], &[tar_of(tar::EntryType::Regular, "workspace/a", None), vec![0; 1024]].concat()[..]).unwrap();
    assert_eq!(to.all(), is(&[(".config/claude/projects/-home/s.jsonl", "said"), ("a", "evil")]));
}

#[test]
fn who_is_not_root_moves_what_may_not_be_written_to() {
    if !inside(&["-U"], "who_is_not_root_moves_what_may_not_be_written_to") {
        return;
    }
    let (from, to) = (Place::new("own-from"), Place::new("own-to"));
    for place in [&from, &to] {
        place.write("code/deep/run", "#!");
        place.write("code/other", "");
        for path in ["home/code/deep", "home/code"] {
            fs::set_permissions(place.dir.join(path), fs::Permissions::from_mode(0o555)).unwrap();
        }
    }
    let mode = |path: &str| to.dir.join("home").join(path).metadata().unwrap().permissions().mode() & 0o777;
    let twice = TWICE.map(|(kind, path)| tar_of(kind, path, None)).concat();
    assert!(to.unpack(&[], &[twice, vec![0; 1024]].concat()[..]).is_err());
    assert_eq!((to.all(), mode("code"), mode("code/deep")), (from.all(), 0o555, 0o555));
    let tar = from.pack(&[], MOST).unwrap();
    to.unpack(&[], &tar[..]).unwrap();
    assert_eq!((to.all(), mode("code"), mode("code/deep")), (from.all(), 0o555, 0o555));
    assert_eq!(fs::read_dir(to.dir.join("home")).unwrap().count(), 2, "nothing is left beside it");
    for place in [&from, &to] {
        run("chmod -R u+w .", &place.dir);
    }
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
