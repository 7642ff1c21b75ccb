//! Where wrappers of different users leave their numbers for one hub.
//!
//! ```text
//!   /run/agent-sidecar-users        root's, like what is directly below it: nobody can put another directory in the place of one
//!     hub-HASH/1001                 user 1001 alone writes there, the hub's group reads and clears away
//!     hub-HASH/1002
//!     hub-HASH/hub                  the hub's: its socket, and what it has to say to the wrappers
//! ```
//!
//! Root makes them, once; then the hub may be somebody who is in that group and has no power at all. Who owns a directory is who wrote
//! what is in it. The hub writes nothing there, so that nobody can have it write elsewhere.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::supervise::User;

/// More than anybody keeps apart in one container.
pub(crate) const MOST: usize = 64;
/// The hub's own, among the users'.
const HUB: &str = "hub";

/// One whose wrappers are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) uid: u32,
    /// For whom all its agents work, whatever they say.
    pub(crate) tenant: Option<String>,
}

/// `app,worker=acme,1003=globex`: users, and the tenants of those whose agents work for one.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn split(text: &str) -> Result<Vec<(&str, Option<&str>)>, String> {
    let parts = text.split(',').map(str::trim);
    let list: Vec<(&str, Option<&str>)> =
        parts.map(|part| part.split_once('=').map_or((part, None), |(who, of)| (who.trim(), Some(of.trim())))).collect();
    let label = |tenant: &str| !tenant.is_empty() && tenant.len() <= 64 && !tenant.contains(char::is_control);
    let right = |(who, tenant): &(&str, Option<&str>)| {
        !who.is_empty() && !who.contains(|c: char| c.is_whitespace() || c == ':') && tenant.is_none_or(label)
    };
    if !list.iter().all(right) {
        return Err(String::from("is a list of users, each a name or a number, and `=tenant` if it has one"));
    }
    let names: BTreeSet<&str> = list.iter().map(|(who, _)| *who).collect();
    if names.len() < list.len() || list.len() > MOST {
        return Err(format!("names a user twice, or more than {MOST}"));
    }
    Ok(list)
}

/// Those users, and root, whose agents may be anybody's.
///
/// # Errors
/// One of them is not there, or is not kept apart from the hub.
pub(crate) fn members(text: &str, hub: Option<&User>) -> io::Result<Vec<Member>> {
    let list = split(text).map_err(io::Error::other)?;
    let mut members: Vec<Member> = Vec::new();
    for (who, tenant) in list {
        let user = User::named(who).map_err(io::Error::other)?;
        let uid = user.uid();
        if let Some(hub) = hub.filter(|hub| !hub.is_root() && (hub.uid() == uid || user.is_of(hub.gid()))) {
            let what = format!("`{who}` is the hub's user, or in its group {}: give `hub.user` a group of its own", hub.gid());
            return Err(io::Error::other(what));
        }
        if members.iter().any(|known| known.uid == uid) {
            return Err(io::Error::other(format!("`hub.users` names uid {uid} twice")));
        }
        members.push(Member { uid, tenant: tenant.map(str::to_owned) });
    }
    if members.iter().all(|known| known.uid != 0) {
        members.push(Member { uid: 0, tenant: None });
    }
    Ok(members)
}

/// What the hub of several users has: its own directory, and theirs.
pub(super) fn dir_of(door: &Path, uid: u32) -> PathBuf {
    door.with_file_name(uid.to_string())
}

/// Where orders for a user's agents are.
pub(super) fn orders_of(door: &Path, uid: u32) -> PathBuf {
    door.join(uid.to_string())
}

/// Makes the directories, as root: what users have left in theirs stays. The hub's own.
pub(super) fn make(root: &Path, key: &str, members: &[Member], hub: &User) -> io::Result<PathBuf> {
    let above = root.join(key);
    for dir in [root, &above] {
        give(dir, 0, 0, 0o755)?;
        trusted(dir)?;
    }
    for member in members {
        // Files in it are of this group, too. Root needs none, and others may be in its own.
        let mode = if hub.is_root() { 0o700 } else { 0o2770 };
        give(&above.join(member.uid.to_string()), member.uid, hub.gid(), mode)?;
    }
    let door = above.join(HUB);
    give(&door, hub.uid(), hub.gid(), 0o711)?;
    Ok(door)
}

/// The hub's own, for what it has to say to each: in its directory root, too, may have nothing to say.
pub(super) fn make_orders(door: &Path, members: &[Member]) -> io::Result<()> {
    let us = User::ours();
    members.iter().try_for_each(|member| give(&orders_of(door, member.uid), us.uid(), us.gid(), 0o711))
}

/// Where we are one of those users: our directory, and the hub's.
pub(super) fn find(root: &Path, key: &str) -> io::Result<Option<(PathBuf, PathBuf)>> {
    let us = rustix::process::geteuid().as_raw();
    let above = root.join(key);
    let ours = above.join(us.to_string());
    let found = match fs::symlink_metadata(&ours) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => return Ok(None),
        found => found?,
    };
    trusted(root)?;
    trusted(&above)?;
    if !found.is_dir() || found.uid() != us || found.mode() & 0o007 != 0 {
        return Err(denied(&ours, "is not a directory of this user and the hub alone"));
    }
    Ok(Some((ours, above.join(HUB))))
}

/// Only root says what is in it.
fn trusted(dir: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(dir)?;
    if found.is_dir() && found.uid() == 0 && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(denied(dir, "is not a directory of root's where nobody else may write"))
}

fn denied(dir: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, format!("{} {what}", dir.display()))
}

/// Makes a directory, or takes the one that is there, and gives it to somebody. Not through a link.
fn give(dir: &Path, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(dir)?;
    if found.is_dir() && (found.uid(), found.gid(), found.mode() & 0o7777) == (uid, gid, mode) {
        return Ok(());
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let opened: File = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(dir)?;
    // Before it is another's: then it takes more power than to give it away.
    opened.set_permissions(Permissions::from_mode(mode))?;
    fchown(&opened, Some(uid), Some(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_users_may_say_for_whom_they_work() {
        assert_eq!(split("app, 1002=acme inc").unwrap(), [("app", None), ("1002", Some("acme inc"))]);
        for wrong in ["", "app,", "app=", "a b", "app,app", "app:staff", "=x"] {
            assert!(split(wrong).is_err(), "{wrong}");
        }
        let many: Vec<String> = (0..=MOST).map(|n| n.to_string()).collect();
        assert!(split(&many.join(",")).is_err());
        let list = members("1002=acme,1003", None).unwrap();
        assert_eq!(list.iter().map(|one| one.uid).collect::<Vec<_>>(), [1002, 1003, 0]);
        assert!(members("0,root", None).is_err());
        let hub = User::named("65533:1003").unwrap();
        assert!(members("1002", Some(&hub)).is_ok());
        assert!(members("1003", Some(&hub)).is_err(), "it would read what the others write");
        assert!(members("65533", Some(&hub)).is_err());
    }

    #[test]
    fn what_somebody_else_could_have_made_is_not_joined() {
        let root = std::env::temp_dir().join(format!("agent-sidecar-users-{}", std::process::id()));
        let us = rustix::process::geteuid().as_raw();
        assert!(find(&root, "hub-1").unwrap().is_none());
        let ours = root.join("hub-1").join(us.to_string());
        fs::create_dir_all(&ours).unwrap();
        let mode = |dir: &Path, mode| fs::set_permissions(dir, Permissions::from_mode(mode)).unwrap();
        mode(&root, 0o755);
        mode(&root.join("hub-1"), 0o755);
        mode(&ours, 0o770);
        // Only what root has made.
        assert_eq!(find(&root, "hub-1").is_ok(), us == 0);
        mode(&ours, 0o777);
        assert!(find(&root, "hub-1").is_err());
        mode(&ours, 0o770);
        mode(&root.join("hub-1"), 0o775);
        assert!(find(&root, "hub-1").is_err());
        fs::remove_dir_all(root).unwrap();
    }
}
