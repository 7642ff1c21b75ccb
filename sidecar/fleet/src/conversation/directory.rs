//! A directory: of this machine, or of a file system that several share.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::SystemTime;

use async_trait::async_trait;

use super::{Error, Result, Shelf, is_older, private};

/// What is not there yet is called so.
const BEGUN: &str = ".begun-";

pub struct Directory {
    root: PathBuf,
    /// Something of the fleet's is there: if it is not seen, what should be mounted is not, and nothing is made in its place.
    kept: Arc<AtomicBool>,
}

impl Directory {
    pub fn new(root: PathBuf) -> Self {
        Self { root, kept: Arc::default() }
    }

    /// Where all of one fleet's is.
    fn of_fleet(&self, name: &str) -> PathBuf {
        self.root.join(name.split('/').next().unwrap_or_default())
    }
}

async fn blocking<T: Send + 'static>(what: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(what).await.map_err(|_| Error::Passing(String::from("the directory: a panic")))?;
    done.map_err(|error| Error::Passing(format!("the directory of conversations: {error}")))
}

fn put(path: &Path, file: &Path) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let begun = dir.join(format!("{BEGUN}{}", uuid::Uuid::now_v7()));
    let put = || {
        let mut to = private(&begun)?;
        std::io::copy(&mut fs::File::open(file)?, &mut to)?;
        // There before it has its name, and its name before anybody is told.
        to.sync_all()?;
        fs::rename(&begun, path)?;
        fs::File::open(dir)?.sync_all()
    };
    put().inspect_err(|_| drop(fs::remove_file(&begun)))
}

/// Every file below.
fn walk(dir: &Path, found: &mut dyn FnMut(&fs::DirEntry)) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        } else {
            found(&entry);
        }
    }
    Ok(())
}

fn is_begun(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(BEGUN)
}

/// Of a whole directory alone, so that not all of it is walked for one session.
fn directory(root: &Path, beginning: &str) -> PathBuf {
    root.join(beginning.rsplit_once('/').map_or("", |(dir, _)| dir))
}

#[async_trait]
impl Shelf for Directory {
    async fn put(&self, name: &str, file: &Path) -> Result<()> {
        let (path, file) = (self.root.join(name), file.to_owned());
        let (fleet, kept) = (self.of_fleet(name), Arc::clone(&self.kept));
        blocking(move || {
            if kept.load(Relaxed) && !fleet.is_dir() {
                let what = format!("nothing of this fleet's is at {}: what should be mounted there is not", fleet.display());
                return Err(std::io::Error::new(std::io::ErrorKind::NotFound, what));
            }
            put(&path, &file)?;
            kept.store(true, Relaxed);
            Ok(())
        })
        .await
    }

    fn expects(&self) {
        self.kept.store(true, Relaxed);
    }

    async fn get(&self, name: &str, to: &Path) -> Result<()> {
        let (path, to) = (self.root.join(name), to.to_owned());
        // Where nothing of the fleet is, what should be mounted is not.
        let fleet = self.of_fleet(name);
        let there = blocking(move || match fs::File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && fleet.is_dir() => Ok(false),
            from => std::io::copy(&mut from?, &mut private(&to)?).map(|_| true),
        });
        if there.await? { Ok(()) } else { Err(gone()) }
    }

    async fn list(&self, beginning: &str) -> Result<Vec<String>> {
        let root = self.root.clone();
        let dir = directory(&root, beginning);
        let mut found = blocking(move || {
            let mut found = Vec::new();
            let mut add = |entry: &fs::DirEntry| {
                let path = entry.path();
                let name = path.strip_prefix(&root).ok().and_then(Path::to_str).filter(|_| !is_begun(entry));
                found.extend(name.map(str::to_owned));
            };
            walk(&dir, &mut add).map(|()| found)
        })
        .await?;
        found.retain(|name| name.starts_with(beginning));
        found.sort();
        Ok(found)
    }

    async fn delete(&self, name: &str) -> Result<()> {
        let path = self.root.join(name);
        blocking(move || match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => {
                // Its directory goes with the last that is in it.
                path.parent().map(fs::remove_dir);
                Ok(())
            }
        })
        .await
    }

    async fn tidy(&self, beginning: &str, before: SystemTime) -> Result<usize> {
        let dir = directory(&self.root, beginning);
        blocking(move || {
            let mut old = Vec::new();
            walk(&dir, &mut |entry| old.extend((is_begun(entry) && is_older(entry, before)).then(|| entry.path())))?;
            for path in &old {
                fs::remove_file(path)?;
                path.parent().map(fs::remove_dir);
            }
            Ok(old.len())
        })
        .await
    }
}

/// What was put away is not there.
pub(super) fn gone() -> Error {
    Error::Lasting(String::from("what was put away is gone"))
}
