//! `install` and `uninstall` in a tree as pip, npm and the native installer leave it.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::*;

const WHEEL: &str = "venv/lib/python3.11/site-packages/claude_agent_sdk/_bundled/claude";
const SDK: &str = "app/node_modules/@anthropic-ai/claude-agent-sdk-linux-x64/claude";
/// Two names of one file.
const NPM: [&str; 2] = [
    "usr/lib/node_modules/@anthropic-ai/claude-code/bin/claude.exe",
    "usr/lib/node_modules/@anthropic-ai/claude-code/node_modules/@anthropic-ai/claude-code-linux-x64/claude",
];
/// A link to the first of them.
const NPM_LINK: &str = "usr/bin/claude";
/// A link to a version that the next update leaves.
const NATIVE: &str = "home/.local/bin/claude";
/// A link to a script that SDKs of the time start with node.
const OLD_LINK: &str = "old/node_modules/.bin/claude";
const OLD: &str = "old/node_modules/@anthropic-ai/claude-code/cli.js";
/// Called like it, and none.
const OTHERS: [&str; 3] = ["usr/share/bash-completion/completions/claude", "usr/src/claude", "home/bin/claude"];

/// Where a shim comes to stand.
const PLACES: [&str; 6] = [WHEEL, SDK, NPM[0], NPM[1], NATIVE, OLD_LINK];

fn cli(path: &Path, version: &str) {
    script(path, &format!("[ \"$1\" = --version ] && {{ echo '{version} (Claude Code)'; exit; }}\necho {version} ran"));
}

fn link(to: &str, at: &Path) {
    std::fs::create_dir_all(at.parent().unwrap()).unwrap();
    symlink(to, at).unwrap();
}

fn tree(name: &str) -> Scratch {
    let root = Scratch::new("install", name);
    cli(&root.join(WHEEL), "2.1.330");
    cli(&root.join(SDK), "2.1.331");
    cli(&root.join(NPM[1]), "2.1.332");
    std::fs::create_dir_all(root.join(NPM[0]).parent().unwrap()).unwrap();
    std::fs::hard_link(root.join(NPM[1]), root.join(NPM[0])).unwrap();
    link("../lib/node_modules/@anthropic-ai/claude-code/bin/claude.exe", &root.join(NPM_LINK));
    cli(&root.join("home/.local/share/claude/versions/2.1.197"), "2.1.197");
    link("../share/claude/versions/2.1.197", &root.join(NATIVE));
    cli(&root.join(OLD), "2.1.90");
    link("../@anthropic-ai/claude-code/cli.js", &root.join(OLD_LINK));
    std::fs::create_dir_all(root.join("usr/share/bash-completion/completions")).unwrap();
    std::fs::write(root.join(OTHERS[0]), "complete claude\n").unwrap();
    script(&root.join(OTHERS[1]), "echo 1.0 of something else");
    script(&root.join(OTHERS[2]), "# starts agent-sidecar run\nexec echo '2.1.330 (Claude Code)'");
    // What packages are copied and linked from is not searched.
    cli(&root.join("home/.cache/uv/archive-v0/x/claude_agent_sdk/_bundled/claude"), "2.1.330");
    root
}

/// Each entry, with all that a user could notice.
fn look(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut seen = BTreeMap::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let at = path.symlink_metadata().unwrap();
            if at.is_dir() {
                dirs.push(path.clone());
                seen.insert(path, format!("{:o} {} {}", at.mode(), at.uid(), at.gid()));
                continue;
            }
            let end = std::fs::read_link(&path).ok();
            let time = (at.mtime(), at.mtime_nsec());
            let all =
                format!("{} {:o} {} {} {} {time:?} {} {end:?}", at.ino(), at.mode(), at.uid(), at.gid(), at.nlink(), at.len());
            seen.insert(path, all);
        }
    }
    seen
}

fn sidecar(words: &[&str], paths: &[&Path]) -> (i32, String) {
    let out = Command::new(SIDECAR).args(words).args(paths).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
    (out.status.code().unwrap(), said)
}

fn line<'a>(said: &'a str, path: &str) -> &'a str {
    said.lines().find(|line| line.contains(&format!("{path}:"))).unwrap_or_else(|| panic!("nothing of {path}: {said}"))
}

/// What a CLI prints, whoever stands before it.
fn runs(path: &Path) -> String {
    let ran = |words: &[&str]| {
        let out = Command::new(path).args(words).env("AGENT_SIDECAR_LISTEN", "off").stdin(Stdio::null()).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    let [version, prompt] = [&["--version"][..], &["-p", "hello"]].map(ran);
    assert_eq!(version.replace(" (Claude Code)", " ran"), prompt);
    version.split(' ').next().unwrap().to_owned()
}

fn is_shim(path: &Path) -> bool {
    path.symlink_metadata().unwrap().is_file() && std::fs::read(path).unwrap() == std::fs::read(SIDECAR).unwrap()
}

#[test]
fn every_cli_gets_a_shim_and_comes_back_as_it_was() {
    let root = tree("all");
    let before = look(&root);
    let (code, printed) = sidecar(&["install", "--print"], &[&root]);
    assert_eq!(code, 0, "{printed}");
    assert_eq!(look(&root), before, "--print changes nothing");

    let (code, said) = sidecar(&["install"], &[&root]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(said.replace("installed    ", "would install "), printed, "--print says what is done");
    for (place, version) in PLACES.into_iter().zip(["2.1.330", "2.1.331", "2.1.332", "2.1.332", "2.1.197", "2.1.90"]) {
        assert!(line(&said, place).starts_with("installed") && line(&said, place).contains(version), "{said}");
        assert!(is_shim(&root.join(place)), "{place}");
        assert_eq!(runs(&root.join(place)), version);
    }
    assert_eq!(runs(&root.join(NPM_LINK)), "2.1.332");
    for other in OTHERS {
        assert!(line(&said, other).starts_with("skipped"), "{said}");
    }
    assert!(!said.contains(".cache/uv"), "{said}");

    let installed = look(&root);
    let (code, said) = sidecar(&["install"], &[&root]);
    assert_eq!((code, said.matches("in place").count()), (0, PLACES.len()), "{said}");
    assert_eq!(look(&root), installed, "again is no change");

    let (code, printed) = sidecar(&["uninstall", "--print"], &[&root]);
    assert_eq!((code, printed.matches("would restore").count()), (0, PLACES.len()), "{printed}");
    assert_eq!(look(&root), installed);
    let (code, said) = sidecar(&["uninstall"], &[&root]);
    assert_eq!((code, said.matches("restored").count()), (0, PLACES.len()), "{said}");
    assert_eq!(look(&root), before, "files, links, modes, owners and times are what they were");
    let (code, said) = sidecar(&["uninstall"], &[&root]);
    assert_eq!(code, 0, "{said}");
    assert!(PLACES.iter().all(|place| line(&said, place).starts_with("not there")), "{said}");
    assert_eq!(look(&root), before);
}

/// As Debian's alternatives do; found in the order of their names, which is not that of the links.
#[test]
fn links_to_links_have_one_shim_between_them() {
    let root = Scratch::new("install", "links");
    cli(&root.join("opt/claude-2.1"), "2.1.330");
    link("../opt/claude-2.1", &root.join("z/claude"));
    link("../z/claude", &root.join("b/claude"));
    link("../b/claude", &root.join("a/claude"));
    let before = look(&root);
    for (again, done) in [(false, "installed"), (true, "in place")] {
        let (code, said) = sidecar(&["install"], &[&root]);
        assert_eq!((code, said.lines().count()), (0, 1), "again: {again}; {said}");
        assert!(line(&said, "z/claude").starts_with(done), "{said}");
    }
    for place in ["a/claude", "b/claude", "z/claude"] {
        assert_eq!(runs(&root.join(place)), "2.1.330", "{place}");
    }
    let (code, said) = sidecar(&["uninstall"], &[&root]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(look(&root), before);
    // Where each link has a shim of its own, as older versions left them, each comes back.
    for place in ["a/claude", "z/claude"] {
        std::fs::rename(root.join(place), root.join(format!("{place}.sidecar-real"))).unwrap();
        std::fs::copy(SIDECAR, root.join(place)).unwrap();
    }
    let (code, said) = sidecar(&["uninstall"], &[&root]);
    assert_eq!((code, said.matches("restored").count()), (0, 2), "{said}");
    assert_eq!(look(&root).len(), before.len());
    assert_eq!(runs(&root.join("a/claude")), "2.1.330");
}

#[test]
fn what_starts_a_cli_by_its_own_name_keeps_it() {
    let root = tree("launchers");
    // One program for all commands, as Volta and mise have it; a script for each, as pyenv and nodenv write it; one nobody has seen yet.
    let start = format!("exec {} \"$@\"", root.join(WHEEL).display());
    script(&root.join("volta/bin/volta-shim"), &format!("[ \"${{0##*/}}\" = claude ] || exit 126\n{start}"));
    link("volta-shim", &root.join("volta/bin/claude"));
    script(&root.join("nodenv/shims/claude"), &format!("program=\"${{0##*/}}\"\n[ $program = claude ] || exit 127\n{start}"));
    script(&root.join("other/claude"), &format!("case $0 in *claude) ;; *) exit 1;; esac\n{start}"));
    // A script that takes any name is a CLI as good as any.
    script(&root.join("bin/claude"), &start);
    link("nowhere", &root.join("gone/claude"));
    link("claude", &root.join("circle/claude"));
    let left = ["volta/bin/claude", "nodenv/shims/claude", "other/claude"];
    let before = look(&root);
    let (code, said) = sidecar(&["install"], &[&root]);
    assert_eq!(code, 0, "{said}");
    for path in left.into_iter().chain(["gone/claude", "circle/claude"]) {
        assert!(line(&said, path).starts_with("skipped"), "{said}");
        assert_eq!(look(&root)[&root.join(path)], before[&root.join(path)], "{path}");
        assert!(!root.join(format!("{path}.sidecar-real")).exists(), "{path}");
    }
    for path in left.into_iter().chain(["bin/claude"]) {
        assert_eq!(runs(&root.join(path)), "2.1.330", "{path}");
    }
    let (code, said) = sidecar(&["install"], &[&root.join(left[0])]);
    assert!(code == 1 && said.contains("starts a CLI by the name") && said.contains("volta-shim"), "{said}");
    let (code, said) = sidecar(&["install"], &[&root.join("gone/claude")]);
    assert!(code == 1 && said.contains("is a link to nothing"), "{said}");
}

#[test]
fn a_shim_is_for_whom_the_cli_was_for() {
    let root = tree("owner");
    let wheel = root.join(WHEEL);
    std::fs::set_permissions(&wheel, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
    if root_may_give_away(&wheel) {
        // Asked for its version as its owner, who must be able to get there.
        let (code, said) = sidecar(&["install"], &[&wheel]);
        assert_eq!(code, 0, "{said}");
        let shim = wheel.metadata().unwrap();
        assert_eq!((shim.mode() & 0o7777, shim.uid(), shim.gid()), (0o750, 1234, 1234));
    }
}

#[test]
fn root_runs_nothing_that_others_could_have_put_there() {
    let root = Scratch::new("install", "root-asks");
    // It says who asks.
    let tells = "[ \"$1\" = --version ] && echo \"2.1.$(id -u) (Claude Code)\"";
    let [theirs, open, mine] = ["theirs", "open", "mine"].map(|name| root.join(name).join("claude"));
    for file in [&theirs, &open, &mine] {
        script(&file.with_file_name("program"), tells);
        symlink("program", file).unwrap();
    }
    if !root_may_give_away(&theirs.with_file_name("program")) {
        eprintln!("not tried: not root");
        return;
    }
    // The file is root's, the directory is not.
    std::os::unix::fs::chown(theirs.with_file_name("program"), Some(0), Some(0)).unwrap();
    std::os::unix::fs::chown(theirs.parent().unwrap(), Some(1234), Some(0)).unwrap();
    std::fs::set_permissions(open.parent().unwrap(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    for (file, who) in [(&theirs, "1234"), (&open, "65534")] {
        let (code, said) = sidecar(&["install", "--print"], &[file]);
        assert!(code == 0 && said.contains(&format!("CLI 2.1.{who} becomes")), "{said}");
    }
    // Where only root can change anything, it is root, unless that is not so further up.
    let alone = |dir: std::fs::Metadata| dir.uid() == 0 && (dir.mode() & 0o022 == 0 || dir.mode() & 0o1000 != 0);
    let safe = mine.ancestors().all(|dir| dir.metadata().is_ok_and(alone));
    let (code, said) = sidecar(&["install", "--print"], &[&mine]);
    assert!(code == 0 && said.contains(&format!("CLI 2.1.{} becomes", if safe { 0 } else { 65534 })), "{said}");
}

#[test]
fn what_is_called_like_a_cli_and_is_a_pipe_keeps_nobody_waiting() {
    let root = Scratch::new("install", "pipe");
    assert!(Command::new("mkfifo").arg(root.join("claude")).status().unwrap().success());
    for words in [&["install"][..], &["uninstall"]] {
        let (code, said) = sidecar(words, &[&root.join("claude")]);
        assert!(code == 1 && said.contains("not a file"), "{said}");
    }
    let (_, said) = sidecar(&["doctor"], &[&root]);
    assert!(said.contains("no Claude CLI was found"), "{said}");
}

fn root_may_give_away(path: &Path) -> bool {
    root() && std::os::unix::fs::chown(path, Some(1234), Some(1234)).is_ok() && {
        let reaches =
            Command::new("setpriv").args(["--reuid=1234", "--regid=1234", "--clear-groups", "test", "-x"]).arg(path).status();
        reaches.is_ok_and(|reached| reached.success())
    }
}

#[test]
fn an_upgrade_in_between_is_a_new_cli_and_the_old_one_is_not_mixed_up_with_it() {
    let root = tree("upgrade");
    for reinstall in [true, false] {
        assert_eq!(sidecar(&["install"], &[&root]).0, 0);
        // What pip does: the shim is gone, a new file is there.
        std::fs::remove_file(root.join(WHEEL)).unwrap();
        cli(&root.join(WHEEL), "2.1.400");
        assert_eq!(runs(&root.join(WHEEL)), "2.1.400");
        if reinstall {
            let (code, said) = sidecar(&["install"], &[&root]);
            assert!(code == 0 && line(&said, WHEEL).contains("in place of an older one"), "{said}");
            assert!(is_shim(&root.join(WHEEL)));
            assert_eq!(runs(&root.join(WHEEL)), "2.1.400");
        }
        let (code, said) = sidecar(&["uninstall"], &[&root]);
        assert_eq!(code, 0, "{said}");
        assert_eq!(runs(&root.join(WHEEL)), "2.1.400");
        assert!(!root.join(WHEEL).with_extension("sidecar-real").exists(), "{said}");
    }
    // The package goes, and takes the shim along: what is left is said to be.
    assert_eq!(sidecar(&["install"], &[&root]).0, 0);
    std::fs::remove_file(root.join(WHEEL)).unwrap();
    for what in ["install", "uninstall"] {
        let (code, said) = sidecar(&[what], &[&root]);
        assert!(code == 0 && line(&said, "_bundled/claude.sidecar-real").starts_with("left over"), "{said}");
    }
}

#[test]
fn a_shim_of_another_version_is_renewed() {
    let root = tree("renew");
    assert_eq!(sidecar(&["install"], &[&root]).0, 0);
    let shim = root.join(SDK);
    let append = Command::new("sh")
        .args(["-c", "cat \"$1\" > \"$2\" && echo older >> \"$2\"", "sh", SIDECAR])
        .arg(&shim)
        .status()
        .unwrap();
    assert!(append.success());
    assert_eq!(runs(&shim), "2.1.331");
    let (code, said) = sidecar(&["install"], &[&root]);
    assert!(
        code == 0 && line(&said, SDK).starts_with("renewed") && said.matches("in place ").count() == PLACES.len() - 1,
        "{said}"
    );
    assert!(is_shim(&shim));
    assert_eq!(runs(&shim), "2.1.331");
}

#[test]
fn what_is_no_cli_is_refused_and_left_alone() {
    let root = tree("refused");
    script(&root.join("fails/claude"), "exit 3");
    script(&root.join("lies/claude"), "echo 'claude, more or less (Claude Code)'");
    copy(Path::new("/bin/true"), &root.join("other/claude"));
    std::fs::create_dir_all(root.join("empty")).unwrap();
    copy(Path::new(SIDECAR), &root.join("by-hand/claude"));
    link("/no/such/file", &root.join("dangling/claude"));
    let before = look(&root);
    for (place, why) in [
        (OTHERS[0], "not executable"),
        (OTHERS[1], "does not answer to --version"),
        (OTHERS[2], "starts the sidecar already"),
        (OLD, "is started as `node"),
        ("fails/claude", "ends with exit status: 3"),
        ("lies/claude", "does not answer to --version"),
        ("other/claude", "does not answer to --version"),
        ("no/such/claude", "No such file"),
        ("dangling/claude", "is a link to nothing"),
    ] {
        let (code, said) = sidecar(&["install"], &[&root.join(place)]);
        assert!(code == 1 && said.starts_with("failed") && said.contains(why), "{place}: {said}");
    }
    let empty =
        Command::new(SIDECAR).arg("install").arg(root.join("by-hand/claude")).env("PATH", "/usr/bin:/bin").output().unwrap();
    assert_eq!(empty.status.code(), Some(1));
    assert!(String::from_utf8(empty.stdout).unwrap().contains("its CLI is gone"));
    let (code, said) = sidecar(&["uninstall"], &[&root.join("by-hand/claude")]);
    assert!(code == 1 && said.contains("put there by hand"), "{said}");
    let (code, said) = sidecar(&["install"], &[&root.join("empty")]);
    assert!(code == 1 && said.contains("no Claude CLI was found"), "{said}");
    assert_eq!(look(&root), before);
    assert_eq!(sidecar(&["install"], &[]).0, 2);
    // Found and not named, it is no failure: something else is called like it.
    let (code, said) = sidecar(&["install"], &[&root.join("usr")]);
    assert!(code == 0 && line(&said, OTHERS[1]).starts_with("skipped"), "{said}");
}

#[test]
fn whoever_is_killed_leaves_the_old_or_the_new_and_the_next_one_mends_it() {
    let root = tree("killed");
    let before = look(&root);
    let wheel = root.join(WHEEL);
    let hidden = |what: &str| wheel.with_file_name(format!(".claude.agent-sidecar-{what}"));
    let real = wheel.with_file_name("claude.sidecar-real");
    // Every state that there is between two calls of it, the first time and after an upgrade.
    let states: [&dyn Fn(); 4] = [
        &|| std::fs::write(hidden("shim"), "half a").unwrap(),
        &|| std::fs::hard_link(&wheel, &real).unwrap(),
        &|| std::fs::hard_link(&wheel, hidden("real")).unwrap(),
        &|| {
            cli(&real, "2.1.100");
            std::fs::hard_link(&wheel, hidden("real")).unwrap();
            std::fs::write(hidden("shim"), "half a").unwrap();
        },
    ];
    for state in states {
        state();
        assert_eq!(runs(&wheel), "2.1.330");
        let (code, said) = sidecar(&["install"], &[&wheel]);
        assert_eq!(code, 0, "{said}");
        assert!(is_shim(&wheel) && !hidden("shim").exists() && !hidden("real").exists());
        assert_eq!(runs(&wheel), "2.1.330");
        assert_eq!(sidecar(&["uninstall"], &[&wheel]).0, 0);
        assert_eq!(look(&root), before);
        state();
        assert_eq!(sidecar(&["uninstall"], &[&wheel]).0, 0);
        for left in [hidden("shim"), hidden("real"), real.clone()] {
            std::fs::remove_file(left).ok();
        }
    }
    // And wherever a signal happens to come.
    for (n, what) in ["install", "uninstall"].into_iter().cycle().enumerate().take(40) {
        let mut command = Command::new(SIDECAR);
        command.arg(what).arg(&wheel).stdin(Stdio::null());
        let mut running = Running::start_as_is({
            command.stdout(Stdio::null()).stderr(Stdio::null());
            command
        });
        std::thread::sleep(std::time::Duration::from_micros(700) * u32::try_from(n).unwrap());
        running.signal(rustix::process::Signal::KILL);
        running.code();
        assert_eq!(runs(&wheel), "2.1.330", "{what}, killed");
    }
    assert_eq!(sidecar(&["install"], &[&wheel]).0, 0);
    assert!(is_shim(&wheel));
    assert_eq!(sidecar(&["uninstall"], &[&wheel]).0, 0);
    assert_eq!(look(&root), before);
}

#[test]
fn who_runs_the_cli_goes_on() {
    let root = tree("running");
    let wheel = root.join(WHEEL);
    script(&wheel, "[ \"$1\" = --version ] && { echo '2.1.330 (Claude Code)'; exit; }\necho runs\nread line\necho \"$line\"");
    let mut started = Vec::new();
    for what in ["install", "uninstall", "install"] {
        let mut command = Command::new(&wheel);
        command.args(["-p", "--output-format", "json"]).env("AGENT_SIDECAR_LISTEN", "off");
        let mut running = Running::start(command);
        assert_eq!(running.line(), "runs");
        started.push(running);
        assert_eq!(sidecar(&[what], &[&wheel]).0, 0);
    }
    for mut running in started {
        running.write(b"to its end\n").unwrap();
        assert_eq!(running.line(), "to its end");
        assert_eq!(running.code(), Some(0));
    }
}

#[test]
fn two_at_once_are_one_after_the_other() {
    let root = tree("twice");
    let before = look(&root);
    for what in ["install", "uninstall"] {
        let all: Vec<_> =
            (0..6).map(|_| Command::new(SIDECAR).arg(what).arg(&*root).stdout(Stdio::piped()).spawn().unwrap()).collect();
        for one in all {
            let out = one.wait_with_output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
        for place in PLACES {
            assert_eq!(is_shim(&root.join(place)), what == "install");
        }
    }
    assert_eq!(look(&root), before);
}

#[test]
fn what_cannot_be_written_is_said_and_nothing_is_half_done() {
    let root = tree("read-only");
    let before = look(&root);
    // Root may write where nobody may, but not on a file system that is read-only.
    let read_only = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && shift && exec \"$@\"";
    let unshare = |words: &[&std::ffi::OsStr]| {
        let mut command = Command::new("unshare");
        if !crate::support::root() {
            command.arg("-r");
        }
        command.args(["-m", "sh", "-c", read_only, "sh"]).arg(root.join("venv")).args(words).output().unwrap()
    };
    if !unshare(&["true".as_ref()]).status.success() {
        eprintln!("not tried: no namespaces here");
        return;
    }
    for print in [&["--print"][..], &[]] {
        let mut words = vec![SIDECAR.as_ref(), "install".as_ref(), root.as_os_str()];
        words.extend(print.iter().map(std::ffi::OsStr::new));
        let out = unshare(&words);
        let said = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(1), "{said}");
        let refused = line(&said, WHEEL);
        assert!(refused.starts_with("failed") && refused.contains("Read-only file system"), "{said}");
        // One that is refused keeps no other from its shim.
        let others = said.lines().filter(|line| line.starts_with("would install") || line.starts_with("installed"));
        assert_eq!(others.count(), PLACES.len() - 1, "{said}");
    }
    assert_eq!(sidecar(&["uninstall"], &[&root]).0, 0);
    assert_eq!(look(&root), before);
}

#[test]
fn everything_is_what_a_whole_image_holds() {
    let root = tree("image");
    // An image of its own, with what the binary and the scripts need.
    let libraries = Command::new("sh")
        .args(["-c", "ldd \"$1\" /bin/sh | grep -o '/[^ ]*' | grep -v ':$' | sort -u", "sh", SIDECAR])
        .output()
        .unwrap();
    for library in String::from_utf8(libraries.stdout).unwrap().lines().map(Path::new) {
        copy(&library.canonicalize().unwrap(), &root.join(library.strip_prefix("/").unwrap()));
    }
    copy(Path::new(SIDECAR), &root.join("usr/local/bin/agent-sidecar"));
    copy(&Path::new("/bin/sh").canonicalize().unwrap(), &root.join("bin/sh"));
    for dir in ["dev", "proc"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::write(root.join("dev/null"), "").unwrap();
    let chroot = |words: &[&str]| {
        let mut command = Command::new("unshare");
        if !crate::support::root() {
            command.arg("-r");
        }
        command.args(["-m", "sh", "-c", "mount --rbind /proc \"$1/proc\" && exec chroot \"$@\"", "sh"]).arg(&*root).args(words);
        command.env_clear().env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap()
    };
    if !chroot(&["sh", "-c", "true"]).status.success() {
        eprintln!("not tried: no namespaces here");
        return;
    }
    for (words, done, n) in [
        (&["agent-sidecar", "install", "--all", "--print"][..], "would install", PLACES.len()),
        (&["agent-sidecar", "install", "--all"], "installed", PLACES.len()),
        (&["agent-sidecar", "install", "--all"], "in place", PLACES.len()),
        (&["agent-sidecar", "uninstall", "--all"], "restored", PLACES.len()),
    ] {
        let out = chroot(words);
        let said = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        assert!(out.status.success(), "{said}");
        assert_eq!(said.lines().filter(|line| line.starts_with(done)).count(), n, "{said}");
    }
}
