//! What people ask of agents: a file under a lock, written by whoever serves and looked at by every wrapper. So an order outlives the
//! hub that took it, and reaches those who are started later.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use agent_sidecar_core::order::{Order, Orders};

use super::till::lock_named;
use crate::files;

/// Changes the list, and forgets what was asked of those that are gone. `mode` says who may look at it.
pub(super) fn change(dir: &Path, mode: u32, lives: impl Fn(&str) -> bool, change: impl FnOnce(&mut Orders)) -> io::Result<()> {
    let _locked = lock_named(dir, "orders.lock")?;
    let before = read(dir)?;
    let mut orders = before.clone();
    change(&mut orders);
    orders.keep(lives);
    if orders == before {
        return Ok(());
    }
    let new = path(dir).with_extension("tmp");
    let mut file = files::open(&new, OpenOptions::new().write(true).create(true).truncate(true).mode(0o600))?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(&serde_json::to_vec(&orders)?)?;
    fs::rename(&new, path(dir))
}

/// Whether anything is asked of anybody.
pub(super) fn any(dir: &Path) -> bool {
    path(dir).exists()
}

fn path(dir: &Path) -> PathBuf {
    dir.join("orders.json")
}

/// None, where there is no file. One that cannot be read is not taken for none: what was paused would go on.
fn read(dir: &Path) -> io::Result<Orders> {
    match files::read(&path(dir)) {
        Ok(bytes) => Ok(serde_json::from_slice::<Orders>(&bytes)?.checked()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Orders::default().checked()),
        Err(error) => Err(error),
    }
}

/// A wrapper's look at the list.
pub(super) struct Look {
    dir: PathBuf,
    run: String,
    /// The file as it was when it was last read.
    seen: Option<(u64, i64, i64, u64)>,
    told: Order,
    /// How often a turn was to be interrupted before we were there.
    before: Option<u64>,
}

impl Look {
    pub(super) fn new(dir: &Path, run: &str) -> Look {
        Look { dir: dir.to_owned(), run: run.to_owned(), seen: None, told: Order::default(), before: None }
    }

    /// What is asked of us, if it is not what was asked before.
    pub(super) fn changed(&mut self) -> io::Result<Option<Order>> {
        let found = match fs::metadata(path(&self.dir)) {
            Ok(found) => Some((found.ino(), found.mtime(), found.mtime_nsec(), found.size())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if found == self.seen && self.before.is_some() {
            return Ok(None);
        }
        let mut order = read(&self.dir)?.of(&self.run);
        self.seen = found;
        let before = *self.before.get_or_insert(order.interrupts);
        order.interrupts = order.interrupts.saturating_sub(before);
        Ok((order != self.told).then_some(order))
    }

    /// It was handed on.
    pub(super) fn told(&mut self, order: Order) {
        self.told = order;
    }

    /// It was not: look once more.
    pub(super) fn again(&mut self) {
        self.seen = Some((0, 0, 0, 0));
    }
}

#[cfg(test)]
mod tests {
    use agent_sidecar_core::order::What;

    use super::*;

    #[test]
    fn a_wrapper_hears_what_is_new_to_it_once() {
        let dir = std::env::temp_dir().join(format!("agent-sidecar-orders-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let a = [String::from("a")];
        let give = |what| change(&dir, 0o600, |_| true, |orders| orders.give(&a, what)).unwrap();
        give(What::Interrupt);
        let mut look = Look::new(&dir, "a");
        assert_eq!(look.changed().unwrap(), None, "that was before its time");
        give(What::Pause { now: true });
        let order = look.changed().unwrap().unwrap();
        assert_eq!((order.paused, order.interrupts), (true, 1));
        look.again();
        assert_eq!(look.changed().unwrap(), Some(order), "nobody has heard it");
        look.told(order);
        assert_eq!(look.changed().unwrap(), None);
        assert!(Look::new(&dir, "a").changed().unwrap().unwrap().paused, "a state is one for those who come later, too");
        fs::write(path(&dir), b"{torn").unwrap();
        assert!(look.changed().is_err() && look.told.paused, "what cannot be read changes nothing");
        assert!(change(&dir, 0o600, |_| true, |_| ()).is_err());
        fs::remove_file(path(&dir)).unwrap();
        assert_eq!(look.changed().unwrap().map(|order| order.paused), Some(false));
        give(What::Stop);
        change(&dir, 0o600, |run| run != "a", |_| ()).unwrap();
        assert_eq!(read(&dir).unwrap().of("a"), Order::default(), "it is gone, and with it what was asked of it");
        fs::remove_dir_all(dir).unwrap();
    }
}
