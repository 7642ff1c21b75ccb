//! As whom the CLI runs: somebody who may neither end nor change whoever watches it.
//!
//! Names are looked up in /etc/passwd and /etc/group alone: a static binary knows no other directory.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::process::{Gid, Uid};
use rustix::thread::CapabilitySet;

/// See the module's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    uid: u32,
    gid: u32,
    /// Further groups.
    groups: Vec<u32>,
    name: Option<String>,
    home: PathBuf,
}

/// Why the CLI cannot be started as somebody.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoUser {
    #[error("there is no user `{0}` in /etc/passwd; make one, or write its number")]
    Name(String),
    #[error("there is no group `{0}` in /etc/group; make one, or write its number")]
    Group(String),
    #[error(
        "the CLI cannot be started as `{user}`, and kept in hand, by uid {uid} without {missing}; start the sidecar as root, or leave `run.user` out"
    )]
    Powerless { user: String, uid: u32, missing: String },
}

impl User {
    /// `NAME`, `UID`, and either with `:GROUP`.
    pub(crate) fn find(text: &str) -> Result<User, NoUser> {
        let user = User::named(text)?;
        let missing = user.missing();
        if missing.is_empty() {
            return Ok(user);
        }
        let missing = missing.join(", ");
        Err(NoUser::Powerless { user: text.to_owned(), uid: rustix::process::geteuid().as_raw(), missing })
    }

    /// The same, whether or not we may start anything as such a one.
    pub(crate) fn named(text: &str) -> Result<User, NoUser> {
        let file = |name| fs::read_to_string(name).unwrap_or_default();
        User::of(text, &file("/etc/passwd"), &file("/etc/group"))
    }

    /// Somebody who owns nothing.
    pub(crate) fn stranger() -> User {
        User { uid: NOBODY, gid: NOBODY, groups: Vec::new(), name: None, home: PathBuf::from("/") }
    }

    /// Who we are.
    pub(crate) fn ours() -> User {
        let groups = rustix::process::getgroups().unwrap_or_default().into_iter().map(Gid::as_raw).collect();
        User {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups,
            name: None,
            home: PathBuf::new(),
        }
    }

    fn of(text: &str, passwd: &str, group: &str) -> Result<User, NoUser> {
        let (who, of) = text.split_once(':').map_or((text, None), |(who, of)| (who, Some(of)));
        let number = who.parse::<u32>().ok();
        let account = accounts(passwd).find(|account| account.name == who).or_else(|| {
            let uid = number?;
            accounts(passwd).find(|account| account.uid == uid)
        });
        let (uid, name, own, home) = match (account, number) {
            (Some(account), _) => (account.uid, Some(account.name), account.gid, account.home),
            // Nobody we know has no home, and no group but one of the same number: 0, as others have it, is root's.
            (None, Some(uid)) => (uid, None, uid, "/"),
            (None, None) => return Err(NoUser::Name(who.to_owned())),
        };
        let gid = match of {
            None => own,
            Some(of) => match (groups(group).find(|(name, ..)| *name == of), of.parse()) {
                (Some((_, gid, _)), _) | (None, Ok(gid)) => gid,
                (None, Err(_)) => return Err(NoUser::Group(of.to_owned())),
            },
        };
        // Who names a group means that one alone.
        let further = name.filter(|_| of.is_none()).map_or(Vec::new(), |name| {
            let member = |members: &str| members.split(',').any(|member| member == name);
            groups(group).filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid).filter(|other| *other != gid).collect()
        });
        Ok(User { uid, gid, groups: further, name: name.map(str::to_owned), home: PathBuf::from(home) })
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    pub(crate) fn gid(&self) -> u32 {
        self.gid
    }

    pub(crate) fn is_us(&self) -> bool {
        self.uid == rustix::process::geteuid().as_raw() && self.gid == rustix::process::getegid().as_raw()
    }

    pub(crate) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// What we lack to make a process somebody else's and to end it then.
    fn missing(&self) -> Vec<&'static str> {
        if self.is_us() {
            return Vec::new();
        }
        let ours = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let needed =
            [("CAP_SETUID", CapabilitySet::SETUID), ("CAP_SETGID", CapabilitySet::SETGID), ("CAP_KILL", CapabilitySet::KILL)];
        needed.into_iter().filter(|(_, one)| !ours.contains(*one)).map(|(name, _)| name).collect()
    }

    /// What we lack to give it directories of its own and to find its sessions there; and to remove what it has made there, if we are to.
    pub(crate) fn missing_for_dirs(&self, remove: bool) -> Vec<&'static str> {
        if self.is_us() {
            return Vec::new();
        }
        let ours = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let all = ours.contains(CapabilitySet::DAC_OVERRIDE);
        let looks = if remove { all } else { all || ours.contains(CapabilitySet::DAC_READ_SEARCH) };
        let look = if remove { "CAP_DAC_OVERRIDE" } else { "CAP_DAC_READ_SEARCH" };
        let needed = [("CAP_CHOWN", ours.contains(CapabilitySet::CHOWN)), (look, looks)];
        needed.into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect()
    }

    /// Makes the calling thread this user's, for good: between fork and exec.
    pub(super) fn assume(&self) -> io::Result<()> {
        if !self.is_us() {
            let gid = Gid::from_raw(self.gid);
            let uid = Uid::from_raw(self.uid);
            set_groups(&self.groups)?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            // Kept by whoever had them without being root. An old kernel has none.
            rustix::thread::clear_ambient_capability_set().ok();
        }
        // No `sudo` leads back.
        Ok(rustix::thread::set_no_new_privs(true)?)
    }

    /// Makes this process this user's: before it has a second thread, which would stay what it is.
    pub(crate) fn become_for_good(&self) -> io::Result<()> {
        if fs::read_dir("/proc/self/task")?.count() > 1 {
            return Err(io::Error::other("it has threads already, which cannot be given to another user"));
        }
        self.assume()
    }

    /// What changes in the environment: who has the sidecar's own home and name there gets those of this user; what somebody has
    /// chosen stays. `None` is to be taken out.
    pub(crate) fn variables(&self) -> Vec<(OsString, Option<OsString>)> {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        self.instead_of(accounts(&passwd).find(|account| account.uid == rustix::process::geteuid().as_raw()), |name| {
            std::env::var_os(name)
        })
    }

    fn instead_of(&self, ours: Option<Account<'_>>, env: impl Fn(&str) -> Option<OsString>) -> Vec<(OsString, Option<OsString>)> {
        if self.is_us() {
            return Vec::new();
        }
        let mut changes = Vec::new();
        let own_home = ours.as_ref().map_or("/", |account| account.home);
        if env("HOME").is_none_or(|home| home.is_empty() || home == own_home || home == "/") {
            changes.push((OsString::from("HOME"), Some(self.home.clone().into())));
        }
        for name in ["USER", "LOGNAME"] {
            if ours.as_ref().is_some_and(|account| env(name).is_some_and(|value| value == account.name)) {
                changes.push((OsString::from(name), self.name.clone().map(OsString::from)));
            }
        }
        changes
    }

    /// Whether this user can change a file, or put another in its place. Root can, and so can the owner of any directory on the way.
    pub(crate) fn may_change(&self, path: &Path) -> bool {
        if self.is_root() {
            return true;
        }
        let Ok(path) = std::path::absolute(path) else { return false };
        // Links may be changed like files, and what they lead to, too.
        let real = path.canonicalize().ok().filter(|real| *real != path);
        let changes = |path: &Path| {
            path.ancestors().enumerate().any(|(n, part)| {
                let Ok(found) = part.symlink_metadata() else { return false };
                if found.is_symlink() {
                    return found.uid() == self.uid && !part.parent().is_some_and(read_only);
                }
                // What others own in a sticky directory stays theirs.
                let sticky = n > 0 && found.mode() & 0o1000 != 0;
                (found.uid() == self.uid || !sticky && self.may_write(&found)) && !read_only(part)
            })
        };
        changes(&path) || real.is_some_and(|real| changes(&real))
    }

    /// Whether this user may write to what is there already.
    pub(crate) fn may_write_to(&self, path: &Path) -> bool {
        if self.is_us() || self.is_root() {
            return rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
        }
        let may = |found: &fs::Metadata| found.uid() == self.uid || self.may_write(found);
        fs::metadata(path).is_ok_and(|found| may(&found)) && !read_only(path)
    }

    fn may_write(&self, file: &fs::Metadata) -> bool {
        let bit = if self.is_of(file.gid()) { 0o020 } else { 0o002 };
        file.mode() & bit != 0
    }

    /// Whether it may go through a directory.
    pub(crate) fn may_pass(&self, dir: &fs::Metadata) -> bool {
        let bit = match () {
            () if self.uid == dir.uid() => 0o100,
            () if self.is_of(dir.gid()) => 0o010,
            () => 0o001,
        };
        dir.mode() & bit != 0
    }

    pub(crate) fn is_of(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

/// Whether nobody can write there, whatever its mode says: directories of a ConfigMap are open to all, and mounted read-only.
fn read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY))
}

fn set_groups(groups: &[u32]) -> io::Result<()> {
    // As many as anybody is in: there is no allocating here.
    let mut list = [Gid::ROOT; MOST_GROUPS];
    let n = groups.len().min(MOST_GROUPS);
    for (place, gid) in list.iter_mut().zip(groups) {
        *place = Gid::from_raw(*gid);
    }
    Ok(rustix::thread::set_thread_groups(&list[..n])?)
}

/// By custom.
const NOBODY: u32 = 65534;
/// Some more would not be an error: who has fewer groups may do less.
const MOST_GROUPS: usize = 256;

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// `name:x:uid:gid:words:home:shell`.
fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
        let home = if home.is_empty() { "/" } else { home };
        Some(Account { name, uid: uid.parse().ok()?, gid: gid.parse().ok()?, home })
    })
}

/// `name:x:gid:member,member`.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?.parse().ok()?);
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1001::/home/agent:/bin/sh\n# none\n1234:x:77:77:::\n";
    const GROUP: &str = "root:x:0:\nagent:x:1001:\ndocker:x:998:app,agent\nstaff:x:50:agent\nlone:x:51";

    fn user(text: &str) -> Result<User, NoUser> {
        User::of(text, PASSWD, GROUP)
    }

    #[test]
    fn a_user_is_found_by_name_or_number_with_the_groups_that_belong_to_it() {
        let agent = user("agent").unwrap();
        assert_eq!((agent.uid, agent.gid, &agent.groups[..]), (1000, 1001, &[998, 50][..]));
        assert_eq!(agent.home, Path::new("/home/agent"));
        assert_eq!(user("1000").unwrap(), agent);
        let named = user("agent:lone").unwrap();
        assert_eq!((named.gid, &named.groups[..]), (51, &[][..]));
        let stranger = user("65000").unwrap();
        assert_eq!((stranger.uid, stranger.gid, &stranger.groups[..]), (65000, 65000, &[][..]));
        assert_eq!(user("65000:7").unwrap().gid, 7);
        // A name that looks like a number is a name first, as everywhere.
        assert_eq!(user("1234").unwrap().uid, 77);
        assert!(matches!(user("nobody-here"), Err(NoUser::Name(_))));
        assert!(matches!(user("agent:none"), Err(NoUser::Group(_))));
    }

    #[test]
    fn what_somebody_chose_for_the_environment_stays() {
        let ours = || accounts(PASSWD).find(|account| account.uid == 0);
        let changes = |user: &User, env: &[(&str, &str)]| {
            let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
            let changes = user.instead_of(ours(), env).into_iter();
            changes
                .map(|(name, value)| (name.into_string().unwrap(), value.map(|v| v.into_string().unwrap())))
                .collect::<Vec<_>>()
        };
        let agent = User { uid: u32::MAX - 2, ..user("agent").unwrap() };
        let set = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
        assert_eq!(
            changes(&agent, &[("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")]),
            [set("HOME", "/home/agent"), set("USER", "agent"), set("LOGNAME", "agent")]
        );
        assert_eq!(changes(&agent, &[]), [set("HOME", "/home/agent")]);
        assert_eq!(changes(&agent, &[("HOME", "/workspace"), ("USER", "ci")]), []);
        let stranger = user("65000").unwrap();
        assert_eq!(changes(&stranger, &[("USER", "root")]), [set("HOME", "/"), ("USER".to_owned(), None)]);
    }

    #[test]
    fn who_owns_a_directory_on_the_way_may_change_what_is_in_it() {
        use std::os::unix::fs::PermissionsExt;
        let root = std::env::temp_dir().join(format!("agent-sidecar-user-{}", std::process::id()));
        let dir = root.join("dir");
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("file");
        fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        mode(&root, 0o755);
        mode(&dir, 0o755);
        mode(&file, 0o644);
        let owner = file.metadata().unwrap();
        let other = User { uid: 12_345, gid: 12_345, ..user("65000").unwrap() };
        assert!(!other.may_change(&file));
        assert!(!other.may_change(&dir.join("new")));
        assert!(User { uid: owner.uid(), ..other.clone() }.may_change(&file));
        mode(&file, 0o666);
        assert!(other.may_change(&file));
        mode(&file, 0o664);
        assert!(!other.may_change(&file));
        assert!(User { groups: vec![owner.gid()], ..other.clone() }.may_change(&file));
        mode(&file, 0o644);
        mode(&dir, 0o777);
        assert!(other.may_change(&file) && other.may_change(&dir.join("new")));
        mode(&dir, 0o1777);
        assert!(!other.may_change(&file));
        let link = root.join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(!other.may_change(&link));
        mode(&file, 0o666);
        assert!(other.may_change(&link));
        fs::remove_dir_all(root).unwrap();
    }
}
