//! Firecracker on this machine: one process and one virtual machine for each container, begun by us and found again by whoever comes after us.
//!
//! ```text
//!  create ─► its directory, its network, its disk ─► firecracker ─► configured over its socket ─► InstanceStart ─► Running
//!  pause  ─► Paused ─► its memory in a file ─► killed              resume ─► a new firecracker ─► loaded ─► Running
//! ```
//!
//! There is no daemon: what is known of a machine is its directory ([`home`]), what it does is what its process and its socket say. It ends nothing
//! by itself: the sidecar's lease and the reconciler do. In the machine `deploy/firecracker/init` is the first process: it fetches command,
//! environment and secrets from Firecracker's metadata service, so that they are in no file, argument or kernel command line.

mod api;
mod forward;
mod home;
mod process;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use hyper::Method;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::process::Command;

use super::secret::{self, Value as Open};
use super::{
    Capabilities, ENDS_LABEL, Endpoint, Error, Exec, Executed, FLEET_LABEL, Happened, KEY_LABEL, Page, Pause, Price, Provider,
    Result, Sandbox, Size, Spec, State, refusals,
};
use api::{Fault, cut};
use home::{Asleep, Home, Lock, Machine, Record};
use process::Process;

/// When a machine that has not ended is asked to once more.
const ASKED_AGAIN: Duration = Duration::from_secs(5);
const NAME: &str = "firecracker";
/// A call that changes little, on a machine that is busy.
const CALL: Duration = Duration::from_secs(30);
/// Memory of many GiB is written to a disk, or mapped from it: in so many seconds, unless somebody says otherwise. Twice that, and a little, is
/// what others wait for who want the same machine.
const SNAPSHOT_SECONDS: u64 = 300;
/// From its beginning until its socket is there.
const BEGIN: Duration = Duration::from_secs(30);
/// A process that does not answer and is there is ending, or not well.
const ENDING: Duration = Duration::from_secs(3);
/// What a file system is made within.
const FORMAT: Duration = Duration::from_secs(120);
/// A socket's path is no longer, by the kernel's word.
const SOCKET_MOST: usize = 107;
/// What is said to the machine: environment, secrets and command. Firecracker's own bound is 50 KiB.
const METADATA_MOST: usize = 1 << 20;
/// Firecracker has no more.
const CPUS_MOST: u32 = 32;
/// How the init says it, last of all.
const ENDED: &str = "agent-init: the command has ended with ";
/// Where that is looked for: the kernel prints a little behind it.
const ENDED_WITHIN: usize = 16 << 10;
/// What OpenCost takes for a machine whose price it does not know.
const OPENCOST: (f64, f64) = (0.031611, 0.004237);

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    #[serde(default = "firecracker")]
    pub firecracker: PathBuf,
    /// Firecracker in a directory and with a user of its own. The fleet must be root for that.
    #[serde(default)]
    pub jailer: Option<Jailer>,
    /// The kernel that the machines boot: on x86-64 an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// What it is told, before what this provider tells it.
    #[serde(default = "boot_args")]
    pub boot_args: String,
    /// The first process, in the image.
    #[serde(default = "init")]
    pub init: String,
    /// Where the machines are kept: disks, consoles, and the memory of those that sleep. One fleet's alone.
    pub directory: PathBuf,
    pub network: Network,
    /// Where ports are reached.
    #[serde(default)]
    pub reach: Reach,
    /// What makes a file system of the file that is put behind it.
    #[serde(default = "format")]
    pub format: Vec<String>,
    /// The device without which there are no machines.
    #[serde(default = "kvm")]
    pub kvm: PathBuf,
    /// Whether what wakes up has the clock of now (x86-64, Firecracker 1.16, Linux 5.16). Its monotonic clock jumps as well then.
    #[serde(default)]
    pub clock_realtime: bool,
    /// How long a machine's memory may take to a disk, and back. What takes longer goes on running.
    #[serde(default = "snapshot_seconds")]
    pub snapshot_seconds: u64,
    /// Of the machine: USD per hour for a CPU, and for a GiB of memory.
    #[serde(default = "cpu_usd_per_hour")]
    pub cpu_usd_per_hour: f64,
    #[serde(default = "gib_usd_per_hour")]
    pub gib_usd_per_hour: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jailer {
    pub program: PathBuf,
    pub uid: u32,
    pub gid: u32,
    /// Kernel and images must be on the same file system: they are linked, not copied.
    pub chroot_base: PathBuf,
    /// As the jailer takes them: `cpu.max=100000 100000`. The version is 2.
    #[serde(default)]
    pub cgroups: Vec<String>,
    #[serde(default)]
    pub parent_cgroup: Option<String>,
    #[serde(default)]
    pub netns: Option<PathBuf>,
}

/// Networks that the operator has made: tap devices `PREFIX0`, `PREFIX1`, …, each with four addresses of the subnet: the second is the device's,
/// the third the machine's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub tap_prefix: String,
    /// How many: no more machines than that.
    pub taps: u32,
    /// The first address: `172.30.0.0`.
    pub first: Ipv4Addr,
    /// Who resolves names.
    #[serde(default)]
    pub dns: Option<Ipv4Addr>,
}

/// Where a port of a machine is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// At the machine's own address.
    #[default]
    Network,
    /// At a port of this machine's loopback, and from there through the machine's vsock: the image needs `socat`.
    Vsock,
}

fn firecracker() -> PathBuf {
    PathBuf::from("/usr/local/bin/firecracker")
}

fn boot_args() -> String {
    // Without i8042's probing it boots faster; what restarts ends, by `reboot=k`.
    String::from("console=ttyS0 reboot=k panic=1 quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd")
}

fn init() -> String {
    String::from("/sbin/agent-init")
}

fn format() -> Vec<String> {
    ["mkfs.ext4", "-q", "-F", "-m", "0"].map(String::from).to_vec()
}

fn kvm() -> PathBuf {
    PathBuf::from("/dev/kvm")
}

fn snapshot_seconds() -> u64 {
    SNAPSHOT_SECONDS
}

fn cpu_usd_per_hour() -> f64 {
    OPENCOST.0
}

fn gib_usd_per_hour() -> f64 {
    OPENCOST.1
}

impl Network {
    /// The device, its address, and the machine's.
    fn of(&self, tap: u32) -> (String, Ipv4Addr, Ipv4Addr) {
        let first = u32::from(self.first).saturating_add(tap * 4);
        (format!("{}{tap}", self.tap_prefix), Ipv4Addr::from(first + 1), Ipv4Addr::from(first + 2))
    }
}

/// What is a directory's name, a machine's id and a host's name.
fn is_key(key: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (1..=64).contains(&key.len()) && !key.starts_with('-') && key.chars().all(fits)
}

pub struct Firecracker {
    settings: Settings,
    home: Home,
    forwards: forward::Forwards,
}

/// Where Firecracker's own files are, for us and for it.
struct Place {
    here: PathBuf,
    there: PathBuf,
}

impl Place {
    fn here(&self, name: &str) -> PathBuf {
        self.here.join(name)
    }

    fn there(&self, name: &str) -> PathBuf {
        self.there.join(name)
    }

    fn socket(&self) -> PathBuf {
        self.here("api.sock")
    }
}

/// What a machine is found to be.
struct Found {
    record: Record,
    machine: Machine,
    process: Option<Process>,
}

impl Firecracker {
    /// Touches nothing: what is missing is said when a machine is made.
    ///
    /// # Errors
    /// What cannot be, in words.
    pub fn new(settings: Settings) -> std::result::Result<Self, String> {
        let Network { tap_prefix, taps, first, .. } = &settings.network;
        // A device's name has at most 15 letters.
        if tap_prefix.is_empty() || format!("{tap_prefix}{}", taps.saturating_sub(1)).len() > 15 {
            return Err(String::from("`tap_prefix` and a number are a device's name: 1 to 15 letters"));
        }
        let room = u32::MAX - u32::from(*first);
        if *taps == 0 || u64::from(*taps) * 4 > u64::from(room) || u32::from(*first) % 4 != 0 {
            return Err(String::from(
                "`taps` is 1 or more, and `first` is an address that four divides, with four behind it for each",
            ));
        }
        let absolute = [Some(&settings.directory), settings.jailer.as_ref().map(|jailer| &jailer.chroot_base)];
        if let Some(path) = absolute.into_iter().flatten().find(|path| !path.is_absolute()) {
            return Err(format!("`{}` must begin with `/`", path.display()));
        }
        if !(1..=SNAPSHOT_SECONDS).contains(&settings.snapshot_seconds) {
            return Err(format!("`snapshot_seconds` is 1 to {SNAPSHOT_SECONDS}"));
        }
        if settings.format.is_empty() {
            return Err(String::from("`format` is a program and its arguments"));
        }
        let home = Home::new(&settings.directory);
        Ok(Self { settings, home, forwards: forward::Forwards::default() })
    }

    fn place(&self, key: &str) -> Place {
        match &self.settings.jailer {
            None => {
                let files = self.home.of(key).path("files");
                Place { here: files.clone(), there: files }
            }
            Some(jailer) => {
                let program = self.settings.firecracker.file_name().unwrap_or_default();
                Place { here: jailer.chroot_base.join(program).join(key).join("root"), there: PathBuf::from("/") }
            }
        }
    }

    fn find(&self, key: &str) -> Result<Option<Found>> {
        if !is_key(key) {
            return Ok(None);
        }
        let machine = self.home.of(key);
        let Some(record) = machine.record().map_err(|error| self.broken(&error))? else { return Ok(None) };
        let process = machine.process().map_err(|error| self.broken(&error))?;
        Ok(Some(Found { record, machine, process }))
    }

    fn known(&self, key: &str) -> Result<Found> {
        self.find(key)?.ok_or(Error::Missing { provider: NAME })
    }

    /// Held: what was found is so until the lock is dropped.
    async fn held(&self, key: &str) -> Result<(Lock, Found)> {
        let missing = || Error::Missing { provider: NAME };
        if !is_key(key) {
            return Err(missing());
        }
        let lock = self.home.of(key).lock().await.map_err(|error| self.broken(&error))?.ok_or_else(missing)?;
        Ok((lock, self.known(key)?))
    }

    /// What our own directory does not let us.
    fn broken(&self, error: &io::Error) -> Error {
        let directory = self.settings.directory.display();
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                refused(format!("{directory} cannot be used: {error}"))
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => failed(format!("{directory} is full: {error}")),
            _ => failed(format!("{directory}: {error}")),
        }
    }

    async fn ask(&self, key: &str, path: &str) -> std::result::Result<Value, Fault> {
        api::call(&self.place(key).socket(), Method::GET, path, None, CALL).await
    }

    async fn tell(&self, key: &str, method: Method, path: &str, body: &Value) -> std::result::Result<(), Fault> {
        let most = if path.starts_with("/snapshot/") { self.snapshot() } else { CALL };
        api::call(&self.place(key).socket(), method, path, Some(body), most).await.map(drop)
    }

    fn snapshot(&self) -> Duration {
        Duration::from_secs(self.settings.snapshot_seconds)
    }

    /// Firecracker's own word for what it does.
    async fn word(&self, key: &str) -> std::result::Result<String, Fault> {
        let info = self.ask(key, "/").await?;
        info["state"].as_str().map(str::to_owned).ok_or_else(|| Fault::Lost(String::from("/: it does not say its state")))
    }

    async fn patch(&self, key: &str, state: &str) -> Result<()> {
        self.tell(key, Method::PATCH, "/vm", &json!({ "state": state })).await.map_err(wrong)
    }

    /// What can be seen of it, now.
    async fn seen(&self, Found { record, machine, process }: Found) -> Result<Sandbox> {
        let mut reason = None;
        let mut exit_code = None;
        let state = if process.is_some() {
            // Nothing else bounds what it prints.
            if let Err(error) = machine.trim() {
                tracing::warn!(provider = NAME, key = record.key, %error, "what a machine prints could not be cut");
            }
            let began = Instant::now();
            let said = loop {
                match self.word(&record.key).await {
                    // Its end takes a moment, and its socket is gone before it is.
                    Err(Fault::Unreached(_) | Fault::Lost(_)) if machine.has("started") && began.elapsed() < ENDING => {}
                    said => break said,
                }
                if machine.process().map_err(|error| self.broken(&error))?.is_none() {
                    return Box::pin(self.seen(Found { record, machine, process: None })).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            match said {
                Ok(word) => match word.as_str() {
                    // It was to be woken up.
                    "Not started" if machine.has("asleep") => State::Paused,
                    "Not started" => State::Creating,
                    "Running" => State::Running,
                    // Half asleep it has its memory, and its price: who wants it to sleep has to say so again.
                    "Paused" if machine.has("falling-asleep") || machine.has("asleep") => State::Running,
                    "Paused" => State::Paused,
                    _ => State::Unknown(cut(&word)),
                },
                Err(Fault::Unreached(_)) if !machine.has("started") => State::Creating,
                Err(fault) => return Err(passing(fault)),
            }
        } else if !machine.has("started") {
            State::Creating
        } else if machine.has("asleep") {
            State::Paused
        } else {
            let last = machine.printed(ENDED_WITHIN).map_err(|error| self.broken(&error))?;
            exit_code = ended(&last);
            if exit_code.is_none() {
                reason = Some(String::from("its machine has ended, and its init has not said how the command did"));
            }
            State::Stopped
        };
        Ok(Sandbox {
            key: Some(record.key.clone()),
            native: record.key,
            state,
            reason,
            exit_code,
            size: Some(record.size),
            created: Some(record.created),
            deadline: None,
            labels: record.labels,
            node: None,
            disrupted: None,
        })
    }

    /// What there must be, before anything is made.
    fn prepared(&self, spec: &Spec) -> Result<()> {
        let Settings { firecracker, jailer, kernel, kvm, .. } = &self.settings;
        let image = Path::new(&spec.image);
        let program = jailer.as_ref().map_or(firecracker, |jailer| &jailer.program);
        for (what, path) in [("program", program.as_path()), ("program", firecracker), ("kernel", kernel), ("image", image)] {
            if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
                return Err(refused(format!("there is no {what} `{}` on this machine", path.display())));
            }
        }
        // The jailer names its directory by what a link leads to.
        if jailer.is_some() && !fs::canonicalize(firecracker).is_ok_and(|real| real.file_name() == firecracker.file_name()) {
            let link = firecracker.display();
            return Err(refused(format!(
                "`{link}` is a link to a file of another name, and the jailer goes by that: name the file itself"
            )));
        }
        if !image.is_absolute() {
            return Err(refused(format!("the image `{}` must begin with `/`", image.display())));
        }
        if let Err(error) = OpenOptions::new().read(true).write(true).open(kvm) {
            let at = kvm.display();
            return Err(refused(format!("{at} cannot be opened, and without it there are no virtual machines here: {error}")));
        }
        // The longer one of the two.
        let socket = self.place(&spec.key).here("vsock.sock");
        if socket.as_os_str().len() > SOCKET_MOST {
            let at = socket.display();
            return Err(refused(format!(
                "`{at}` is longer than a socket's path may be ({SOCKET_MOST}): take a shorter directory"
            )));
        }
        Ok(())
    }

    /// What is there of it when it is to be created. `None`: nothing that has begun.
    async fn adopt(&self, spec: &Spec) -> Result<Option<Sandbox>> {
        let Some(found) = self.find(&spec.key)? else { return Ok(None) };
        if found.record.labels.get(FLEET_LABEL) != spec.labels.get(FLEET_LABEL) {
            return Err(refused(format!("there is a machine `{}` already, and it is not this fleet's", spec.key)));
        }
        // It was never told to start, whatever there is of it.
        if !found.machine.has("started") {
            return Ok(None);
        }
        let seen = self.seen(found).await?;
        Ok((seen.state != State::Creating).then_some(seen))
    }

    /// Everything of it.
    async fn scrap(&self, key: &str) -> Result<()> {
        self.strip(key).await?;
        self.home.of(key).clear().map_err(|error| self.broken(&error))
    }

    /// Everything but its directory.
    async fn strip(&self, key: &str) -> Result<()> {
        self.forwards.end(key);
        self.kill(key).await?;
        let place = self.place(key);
        if self.settings.jailer.is_some() {
            // The directory with the chroot's `root` in it.
            let jail = place.here.parent().unwrap_or(&place.here).to_owned();
            home::absent(fs::remove_dir_all(jail)).map_err(|error| self.broken(&error))?;
            self.leave_cgroup(key);
        }
        self.home.of(key).empty().map_err(|error| self.broken(&error))
    }

    /// What is not known to run is looked for.
    async fn kill(&self, key: &str) -> Result<()> {
        let machine = self.home.of(key);
        // A record of it that cannot be read is no reason to let it run.
        let known = machine.process().unwrap_or_default();
        let socket = self.place(key).there("api.sock");
        let processes = match known {
            Some(process) => vec![process],
            None => process::find(key, &socket),
        };
        for process in processes {
            process.kill().await.map_err(|error| failed(format!("process {}: {error}", process.pid)))?;
        }
        Ok(())
    }

    /// The jailer makes it, and nobody removes it.
    fn leave_cgroup(&self, key: &str) {
        let Some(jailer) = &self.settings.jailer else { return };
        let program = self.settings.firecracker.file_name().unwrap_or_default();
        let parent = jailer.parent_cgroup.as_ref().map_or(PathBuf::from(program), PathBuf::from);
        if !jailer.cgroups.is_empty()
            && let Err(error) = home::absent(fs::remove_dir(Path::new("/sys/fs/cgroup").join(parent).join(key)))
        {
            tracing::warn!(provider = NAME, key, %error, "a cgroup is left");
        }
    }

    /// From nothing to a machine that runs. The directory is locked, and empty or of one that was never started.
    async fn make(&self, spec: &Spec, start: &str) -> Result<Sandbox> {
        let size = Size { cpu_milli: cpus(spec.size) * 1000, ..spec.size };
        let created = Timestamp::now();
        let mut labels = spec.labels.clone();
        labels.insert(KEY_LABEL.to_owned(), spec.key.clone());
        labels.insert(ENDS_LABEL.to_owned(), created.checked_add(spec.ttl).unwrap_or(Timestamp::MAX).to_string());
        let record = |tap| Record { key: spec.key.clone(), image: spec.image.clone(), size, labels, created, tap };
        let entered = self.home.enter(record, self.settings.network.taps).await.map_err(|error| self.broken(&error))?;
        let Some(record) = entered else {
            return Err(failed(format!("all {} networks are taken: there are as many machines", self.settings.network.taps)));
        };
        let place = self.place(&spec.key);
        self.furnish(&record, &place).await?;
        let machine = self.home.of(&spec.key);
        self.begin(&spec.key).await?;
        for (path, body) in self.configuration(&record, &place, start, &spec.ports) {
            if let Err(fault) = self.tell(&spec.key, Method::PUT, path, &body).await {
                return Err(self.told(&spec.key, fault).await);
            }
        }
        // Before it is told: what may have begun is not begun again.
        machine.write("started", &json!({})).map_err(|error| self.broken(&error))?;
        match self.tell(&spec.key, Method::PUT, "/actions", &json!({ "action_type": "InstanceStart" })).await {
            Ok(()) => self.seen(self.known(&spec.key)?).await,
            // Whether it has started is its to say: who creates it again hears it.
            Err(Fault::Lost(what)) => Err(Error::Unsure { provider: NAME, what }),
            Err(fault) => {
                let error = self.told(&spec.key, fault).await;
                machine.remove("started").map_err(|error| self.broken(&error))?;
                Err(error)
            }
        }
    }

    /// Its files: a disk of its own, and with the jailer a kernel and an image inside.
    async fn furnish(&self, record: &Record, place: &Place) -> Result<()> {
        let broken = |error: io::Error| self.broken(&error);
        match &self.settings.jailer {
            None => home::private(&place.here).map_err(broken)?,
            Some(_) => fs::create_dir_all(&place.here).map_err(broken)?,
        }
        if self.settings.jailer.is_some() {
            for (from, name) in [(self.settings.kernel.as_path(), "kernel"), (Path::new(&record.image), "rootfs")] {
                fs::hard_link(from, place.here(name)).map_err(|error| {
                    let (from, to) = (from.display(), place.here.display());
                    refused(format!("`{from}` cannot be linked into {to}, which must be on the same file system: {error}"))
                })?;
            }
        }
        let disk = place.here("disk");
        let file = self.own(&disk).map_err(broken)?;
        // With holes: it takes what is written.
        file.set_len(u64::from(record.size.disk_mib.max(1)) << 20).map_err(broken)?;
        drop(self.own(&place.here("log")).map_err(broken)?);
        let [program, arguments @ ..] = self.settings.format.as_slice() else { return Ok(()) };
        let made = Command::new(program).args(arguments).arg(&disk).stdin(Stdio::null()).kill_on_drop(true).output();
        let made = tokio::time::timeout(FORMAT, made).await.map_err(|_| failed(format!("`{program}` does not end")))?;
        let made = made.map_err(|error| refused(format!("`{program}`, which makes file systems, cannot be run: {error}")))?;
        if !made.status.success() {
            return Err(failed(format!("`{program}`: {}: {}", made.status, cut(&String::from_utf8_lossy(&made.stderr)))));
        }
        Ok(())
    }

    /// A new file that Firecracker may write, and nobody else.
    fn own(&self, path: &Path) -> io::Result<fs::File> {
        let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
        if let Some(jailer) = &self.settings.jailer {
            chown(path, Some(jailer.uid), Some(jailer.gid))?;
        }
        Ok(file)
    }

    /// A Firecracker whose socket answers, and which is no machine yet.
    async fn begin(&self, key: &str) -> Result<Process> {
        let (place, machine) = (self.place(key), self.home.of(key));
        let broken = |error: io::Error| self.broken(&error);
        // Of the one before. Neither is taken over by the next.
        for stale in ["api.sock", "vsock.sock"] {
            home::absent(fs::remove_file(place.here(stale))).map_err(broken)?;
        }
        let mut command = match &self.settings.jailer {
            None => Command::new(&self.settings.firecracker),
            Some(jailer) => {
                // Its devices are made anew, and it does not like those that are there.
                for made in ["dev", "sys"] {
                    home::absent(fs::remove_dir_all(place.here(made))).map_err(broken)?;
                }
                // So is the file with its process id, since 1.7.
                let program = self.settings.firecracker.file_name().unwrap_or_default().to_string_lossy();
                home::absent(fs::remove_file(place.here(&format!("{program}.pid")))).map_err(broken)?;
                self.jailed(jailer)
            }
        };
        if self.settings.jailer.is_none() {
            command.args(["--id", key]);
        } else {
            command.args(["--id", key, "--"]);
        }
        command.arg("--api-sock").arg(place.there("api.sock"));
        command.args(["--http-api-max-payload-size", &METADATA_MOST.to_string()]);
        // Until it is told where its own log is, that is the console: the machine's, and what it says when it ends at once.
        command.args(["--level", "Warning"]);
        let console = machine.console().map_err(broken)?;
        let errors = console.try_clone().map_err(broken)?;
        // Its own group: what is meant for us, it does not hear. No environment: ours has secrets.
        command.stdin(Stdio::null()).stdout(console).stderr(errors).process_group(0).env_clear().current_dir("/");
        let mut child = command.spawn().map_err(|error| {
            let program = command.as_std().get_program().to_string_lossy().into_owned();
            refused(format!("`{program}` cannot be run: {error}"))
        })?;
        let process = child.id().and_then(|pid| Process::of(i32::try_from(pid).ok()?));
        let id = key.to_owned();
        // Whoever begins it waits for it; if that is no more, the system does.
        tokio::spawn(async move {
            if let Ok(status) = child.wait().await {
                tracing::info!(provider = NAME, key = id, %status, "a machine's process has ended");
            }
        });
        if let Some(process) = &process {
            machine.write("process.json", process).map_err(broken)?;
        }
        let began = Instant::now();
        while self.ask(key, "/").await.is_err() {
            let lives = process.as_ref().is_some_and(Process::lives);
            if !lives || began.elapsed() > BEGIN {
                let said = machine.printed(2000).map_err(broken)?;
                let said = cut(&String::from_utf8_lossy(&said));
                let what = if lives { "does not answer" } else { "has ended at once" };
                return Err(failed(format!("its Firecracker {what}: {said}")));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        process.ok_or_else(|| failed("its Firecracker has ended at once"))
    }

    fn jailed(&self, jailer: &Jailer) -> Command {
        let mut command = Command::new(&jailer.program);
        command.arg("--exec-file").arg(&self.settings.firecracker).arg("--chroot-base-dir").arg(&jailer.chroot_base);
        command.args(["--uid", &jailer.uid.to_string(), "--gid", &jailer.gid.to_string()]);
        // A parent alone is heeded in the second version only.
        if !jailer.cgroups.is_empty() || jailer.parent_cgroup.is_some() {
            command.args(["--cgroup-version", "2"]);
        }
        for cgroup in &jailer.cgroups {
            command.args(["--cgroup", cgroup]);
        }
        if let Some(parent) = &jailer.parent_cgroup {
            command.args(["--parent-cgroup", parent]);
        }
        if let Some(netns) = &jailer.netns {
            command.arg("--netns").arg(netns);
        }
        command
    }

    /// What it is told before it starts, in this order.
    fn configuration(&self, record: &Record, place: &Place, start: &str, ports: &[u16]) -> Vec<(&'static str, Value)> {
        let Settings { kernel, boot_args, init, network, jailer, reach, .. } = &self.settings;
        let (kernel, image) = match jailer {
            None => (kernel.clone(), PathBuf::from(&record.image)),
            Some(_) => (place.there("kernel"), place.there("rootfs")),
        };
        let (tap, gateway, address) = network.of(record.tap);
        let dns = network.dns.map(|dns| format!(":{dns}")).unwrap_or_default();
        let boot_args = format!("{boot_args} init={init} ip={address}::{gateway}:255.255.255.252:{}:eth0:off{dns}", record.key);
        let [a, b, c, d] = address.octets();
        let mut metadata = json!({ "start": start, "id": record.key });
        let mut told = vec![
            ("/logger", json!({ "log_path": place.there("log"), "level": "Warning", "show_level": true })),
            ("/machine-config", json!({ "vcpu_count": record.size.cpu_milli / 1000, "mem_size_mib": record.size.memory_mib })),
            ("/boot-source", json!({ "kernel_image_path": kernel, "boot_args": boot_args })),
            (
                "/drives/rootfs",
                json!({ "drive_id": "rootfs", "path_on_host": image, "is_root_device": true, "is_read_only": true }),
            ),
            (
                "/drives/disk",
                json!({ "drive_id": "disk", "path_on_host": place.there("disk"), "is_root_device": false, "is_read_only": false }),
            ),
            (
                "/network-interfaces/eth0",
                json!({ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": format!("06:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}") }),
            ),
            // Random numbers from the first moment on, and others in a machine that wakes up.
            ("/entropy", json!({})),
        ];
        if *reach == Reach::Vsock {
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            metadata["vsock"] = json!(ports.join(" "));
            // Each machine has a socket of its own: the number tells nobody apart.
            told.push(("/vsock", json!({ "guest_cid": 3, "uds_path": place.there("vsock.sock") })));
        }
        told.push(("/mmds/config", json!({ "version": "V2", "network_interfaces": ["eth0"] })));
        told.push(("/mmds", json!({ "agent-fleet": metadata })));
        told
    }

    /// In Firecracker's words, or in the last of its own if it has ended.
    async fn told(&self, key: &str, fault: Fault) -> Error {
        if matches!(fault, Fault::Said(..)) {
            return wrong(fault);
        }
        let began = Instant::now();
        while let Ok(Some(_)) = self.home.of(key).process() {
            // Its end takes a moment, and its socket is gone before it is.
            if began.elapsed() > ENDING {
                return wrong(fault);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let said = self.home.of(key).printed(2000).unwrap_or_default();
        failed(format!("its Firecracker has ended: {}", cut(&String::from_utf8_lossy(&said))))
    }

    /// Its memory in files, and no process. It stands still.
    async fn put_away(&self, key: &str, machine: &Machine) -> Result<()> {
        let broken = |error: io::Error| self.broken(&error);
        let place = self.place(key);
        if machine.asleep().map_err(broken)?.is_none() {
            let before = self.snapshots(&place).map_err(broken)?;
            // Other names than before: what it woke up from is its memory still.
            let id = uuid::Uuid::now_v7().simple();
            let asleep = Asleep { memory: format!("{id}.memory"), state: format!("{id}.state") };
            let files = [&asleep.memory, &asleep.state];
            let body = json!({
                "snapshot_type": "Full",
                "mem_file_path": place.there(&asleep.memory),
                "snapshot_path": place.there(&asleep.state),
            });
            if let Err(fault) = self.tell(key, Method::PUT, "/snapshot/create", &body).await {
                let error = wrong(fault);
                // It goes on: it was not its mistake. One after the other is answered, so that who is slow is waited for once more; and who is
                // not heard of even then goes on when somebody looks at it.
                let resumed = json!({ "state": "Resumed" });
                let gone_on = api::call(&place.socket(), Method::PATCH, "/vm", Some(&resumed), self.snapshot()).await;
                for file in files {
                    home::absent(fs::remove_file(place.here(file))).map_err(broken)?;
                }
                gone_on.map_err(wrong)?;
                machine.remove("falling-asleep").map_err(broken)?;
                return Err(error);
            }
            for file in files {
                let at = place.here(file);
                // Of many GiB: others go on meanwhile.
                let synced = tokio::task::spawn_blocking(move || fs::File::open(at)?.sync_all()).await;
                synced.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(broken)?;
            }
            machine.write("asleep", &asleep).map_err(broken)?;
            for file in before {
                home::absent(fs::remove_file(file)).map_err(broken)?;
            }
        }
        self.forwards.end(key);
        self.kill(key).await?;
        machine.remove("falling-asleep").map_err(broken)
    }

    /// What was to be put away and is not, and that nobody is at any more, goes on: else it would stand still, and be paid for as if it ran.
    async fn goes_on(&self, key: &str, machine: &Machine) -> Result<()> {
        let broken = |error: io::Error| self.broken(&error);
        let half = || machine.has("falling-asleep") && !machine.has("asleep");
        if !half() {
            return Ok(());
        }
        let Some(_lock) = machine.lock_now().map_err(broken)? else { return Ok(()) };
        if !half() {
            return Ok(());
        }
        match self.word(key).await.map_err(passing)?.as_str() {
            "Paused" => {
                self.patch(key, "Resumed").await?;
                tracing::warn!(provider = NAME, key, "a machine that could not be put away goes on");
            }
            "Running" => {}
            _ => return Ok(()),
        }
        machine.remove("falling-asleep").map_err(broken)
    }

    fn snapshots(&self, place: &Place) -> io::Result<Vec<PathBuf>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&place.here)? {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "memory" || kind == "state") {
                all.push(path);
            }
        }
        Ok(all)
    }

    /// A new process with what was put away.
    async fn wake(&self, key: &str, machine: &Machine, asleep: &Asleep) -> Result<()> {
        let place = self.place(key);
        // Of one who was to wake it up, and was killed himself.
        self.kill(key).await?;
        if let Err(error) = self.begin(key).await {
            self.kill(key).await?;
            return Err(error);
        }
        let mut body = json!({
            "snapshot_path": place.there(&asleep.state),
            "mem_backend": { "backend_type": "File", "backend_path": place.there(&asleep.memory) },
            "resume_vm": false,
        });
        // Those before 1.16 do not know it.
        if self.settings.clock_realtime {
            body["clock_realtime"] = json!(true);
        }
        let log = json!({ "log_path": place.there("log"), "level": "Warning", "show_level": true });
        let loaded = match self.tell(key, Method::PUT, "/logger", &log).await {
            Ok(()) => self.tell(key, Method::PUT, "/snapshot/load", &body).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = loaded {
            let error = match fault {
                // It refuses as it would refuse a mistake, and ends. But another Firecracker, or one on another kind of CPU, may take it.
                Fault::Said(_, what) => failed(what),
                fault => self.told(key, fault).await,
            };
            // It sleeps on: what could not be loaded is no machine.
            self.kill(key).await?;
            return Err(error);
        }
        // Before it goes on: from then on its disk is no more what its memory was put away with.
        machine.remove("asleep").map_err(|error| self.broken(&error))?;
        self.patch(key, "Resumed").await
    }
}

#[async_trait]
impl Provider for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            command: true,
            env: true,
            provider_secrets: false,
            size: true,
            ports: true,
            list: true,
            ttl: None,
            idle_timer: false,
            pause: Pause::Memory,
            exec: false,
            logs: true,
            events: false,
            endpoint: true,
            traffic_keeps_awake: false,
            nodes: false,
        }
    }

    fn price(&self, size: Size) -> Price {
        let Settings { cpu_usd_per_hour, gib_usd_per_hour, .. } = self.settings;
        let running = f64::from(cpus(size)) * cpu_usd_per_hour + f64::from(size.memory_mib) / 1024.0 * gib_usd_per_hour;
        let source = match (cpu_usd_per_hour, gib_usd_per_hour) == OPENCOST {
            true => "OpenCost's default.json, read 2026-11-23",
            false => "the configuration",
        };
        // Asleep it is a file.
        Price { running, paused: 0.0, stopped: 0.0, source: source.to_owned() }
    }

    async fn create(&self, spec: &Spec) -> Result<Sandbox> {
        let wrong = refusals(&self.capabilities(), spec);
        if !wrong.is_empty() {
            return Err(refused(wrong.join("; ")));
        }
        if !is_key(&spec.key) {
            return Err(refused(format!("`{}` is no machine's id: letters, digits and `-`, 64 at most", spec.key)));
        }
        if let Some(known) = self.adopt(spec).await? {
            return Ok(known);
        }
        // Before there is anything of it.
        self.prepared(spec)?;
        let start = start(spec, &secret::read_all(NAME, spec)?)?;
        let _lock = self.home.make(&spec.key).await.map_err(|error| self.broken(&error))?;
        // Somebody was quicker.
        if let Some(known) = self.adopt(spec).await? {
            return Ok(known);
        }
        // What is left of one that was never started.
        self.strip(&spec.key).await?;
        match self.make(spec, &start).await {
            Err(error) if !matches!(error, Error::Unsure { .. }) => {
                self.scrap(&spec.key).await?;
                Err(error)
            }
            done => done,
        }
    }

    async fn start(&self, native: &str) -> Result<()> {
        let (_lock, found) = self.held(native).await?;
        match self.seen(found).await?.state {
            State::Running => Ok(()),
            state => Err(refused(format!("it is {state:?}, and its secrets are kept nowhere: create another"))),
        }
    }

    async fn state(&self, native: &str) -> Result<Sandbox> {
        match self.find(native)? {
            Some(found) => {
                if found.process.is_some() {
                    self.goes_on(native, &found.machine).await?;
                }
                self.seen(found).await
            }
            None => Ok(Sandbox {
                key: None,
                native: native.to_owned(),
                state: State::Missing,
                reason: None,
                exit_code: None,
                size: None,
                created: None,
                deadline: None,
                labels: BTreeMap::new(),
                node: None,
                disrupted: None,
            }),
        }
    }

    async fn list(&self, labels: &BTreeMap<String, String>, _page: Option<&str>) -> Result<Page> {
        let (mut sandboxes, mut unread) = (Vec::new(), 0);
        for (key, record) in self.home.all().map_err(|error| self.broken(&error))? {
            let record = match record {
                Ok(record) => record,
                // Its labels are in what cannot be read: it may be any.
                Err(error) => {
                    super::tell_unread(NAME, &key, &error);
                    unread += 1;
                    continue;
                }
            };
            if !labels.iter().all(|(name, value)| record.labels.get(name) == Some(value)) {
                continue;
            }
            let (machine, labels) = (self.home.of(&key), record.labels.clone());
            let seen = match self.find(&key) {
                Ok(Some(found)) => self.seen(found).await,
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            sandboxes.push(match seen {
                Ok(seen) => seen,
                // One that does not answer is there all the same, and the others are no worse for it.
                Err(error) if error.is_passing() && machine.has("spec.json") => Sandbox {
                    key: Some(record.key.clone()),
                    native: record.key,
                    state: State::Unknown(String::from("silent")),
                    reason: Some(error.to_string()),
                    exit_code: None,
                    size: Some(record.size),
                    created: Some(record.created),
                    deadline: None,
                    labels,
                    node: None,
                    disrupted: None,
                },
                Err(error) if error.is_passing() => continue,
                Err(error) => return Err(error),
            });
        }
        Ok(Page { sandboxes, unread, next: None })
    }

    async fn exec(&self, _native: &str, _command: &Exec) -> Result<Executed> {
        let hint = Some("nothing of ours listens in the machine: give it a `command`, and reach its ports");
        Err(Error::Unsupported { provider: NAME, verb: "execute a command", hint })
    }

    async fn logs(&self, native: &str, most: usize) -> Result<Vec<u8>> {
        self.known(native)?.machine.printed(most).map_err(|error| self.broken(&error))
    }

    async fn keep_alive(&self, native: &str, _until: Timestamp) -> Result<()> {
        // There are no timers.
        self.known(native).map(drop)
    }

    async fn pause(&self, native: &str) -> Result<()> {
        let (_lock, Found { machine, process, .. }) = self.held(native).await?;
        let broken = |error: io::Error| self.broken(&error);
        let Some(_) = process else {
            return match machine.has("asleep") {
                true => Ok(()),
                false => Err(refused("it does not run: there is nothing to put away")),
            };
        };
        if self.word(native).await.map_err(passing)? == "Not started" && machine.has("asleep") {
            return self.kill(native).await;
        }
        machine.write("falling-asleep", &json!({})).map_err(broken)?;
        if let Err(error) = self.patch(native, "Paused").await {
            machine.remove("falling-asleep").map_err(broken)?;
            return Err(error);
        }
        self.put_away(native, &machine).await
    }

    async fn resume(&self, native: &str, _: &[String]) -> Result<()> {
        let (_lock, Found { machine, process, .. }) = self.held(native).await?;
        let broken = |error: io::Error| self.broken(&error);
        if process.is_some() {
            let word = self.word(native).await.map_err(passing)?;
            if word != "Not started" {
                // It was on its way to sleep, or on its way back. What was put away is no more what it is.
                machine.remove("asleep").and_then(|()| machine.remove("falling-asleep")).map_err(broken)?;
                return match word.as_str() {
                    "Running" => Ok(()),
                    _ => self.patch(native, "Resumed").await,
                };
            }
        }
        match machine.asleep().map_err(broken)? {
            Some(asleep) => self.wake(native, &machine, &asleep).await,
            None => Err(refused("it has ended: there is nothing to wake up")),
        }
    }

    async fn stop(&self, native: &str, grace: Duration) -> Result<()> {
        let (_lock, Found { machine, process, .. }) = self.held(native).await?;
        let broken = |error: io::Error| self.broken(&error);
        self.forwards.end(native);
        let Some(process) = process else {
            // What sleeps does not hear. It does not wake up again, and its memory is no use to anybody.
            machine.remove("asleep").map_err(broken)?;
            for file in self
                .snapshots(&self.place(native))
                .or_else(|error| home::absent(Err(error)).map(|()| Vec::new()))
                .map_err(broken)?
            {
                home::absent(fs::remove_file(file)).map_err(broken)?;
            }
            return Ok(());
        };
        let began = Instant::now();
        if self.word(native).await.is_ok_and(|word| word == "Paused") {
            self.patch(native, "Resumed").await?;
            machine.remove("asleep").and_then(|()| machine.remove("falling-asleep")).map_err(broken)?;
        }
        // On x86-64 its keyboard asks. Where there is none, nobody can.
        let heard = self.tell(native, Method::PUT, "/actions", &json!({ "action_type": "SendCtrlAltDel" })).await;
        let mut again = false;
        while heard.is_ok() && process.lives() && began.elapsed() < grace {
            tokio::time::sleep(Duration::from_millis(50)).await;
            // One whose kernel was still beginning has no keyboard yet, and has not heard.
            if !again && began.elapsed() > ASKED_AGAIN {
                again = true;
                self.tell(native, Method::PUT, "/actions", &json!({ "action_type": "SendCtrlAltDel" })).await.ok();
            }
        }
        if let Err(fault) = heard
            && process.lives()
        {
            tracing::warn!(provider = NAME, key = native, ?fault, "a machine cannot be asked to end, and is killed");
        }
        self.kill(native).await?;
        machine.remove("asleep").map_err(broken)
    }

    async fn delete(&self, native: &str) -> Result<()> {
        // A record that cannot be read is removed, too.
        if !is_key(native) {
            return Ok(());
        }
        match self.home.of(native).lock().await.map_err(|error| self.broken(&error))? {
            Some(_lock) => self.scrap(native).await,
            None => Ok(()),
        }
    }

    async fn endpoint(&self, native: &str, port: u16) -> Result<Endpoint> {
        let found = self.known(native)?;
        if found.process.is_none() {
            return Err(failed("it does not run: none of its ports is reached"));
        }
        let at = match self.settings.reach {
            Reach::Network => SocketAddr::from((self.settings.network.of(found.record.tap).2, port)),
            Reach::Vsock => {
                let forwarded = self.forwards.to(native, port, &self.place(native).here("vsock.sock")).await;
                forwarded.map_err(|error| failed(format!("a port of this machine: {error}")))?
            }
        };
        Ok(Endpoint { url: format!("http://{at}"), headers: Vec::new() })
    }

    async fn events(&self, _labels: &BTreeMap<String, String>) -> Result<BoxStream<'static, Result<Happened>>> {
        Err(Error::Unsupported { provider: NAME, verb: "tell what happens", hint: Some("it is asked instead") })
    }
}

fn refused(what: impl Into<String>) -> Error {
    Error::Refused { provider: NAME, what: what.into() }
}

fn failed(what: impl Into<String>) -> Error {
    Error::Failed { provider: NAME, what: what.into() }
}

/// What can be done about it, after something that does not mind being said twice.
fn passing(fault: Fault) -> Error {
    match fault {
        Fault::Unreached(what) | Fault::Lost(what) | Fault::Said(_, what) => failed(what),
    }
}

/// What can be done about it.
fn wrong(fault: Fault) -> Error {
    /// What another moment may mend: memory, a disk, a device that is still held.
    const PASSES: [&str; 8] = [
        "os error 4)",
        "os error 11)",
        "os error 12)",
        "os error 16)",
        "os error 28)",
        "Resource busy",
        "No space left",
        "Cannot allocate",
    ];
    match fault {
        Fault::Unreached(what) => failed(what),
        Fault::Lost(what) => Error::Unsure { provider: NAME, what },
        Fault::Said(400..500, what) if !PASSES.iter().any(|passes| what.contains(passes)) => refused(what),
        Fault::Said(_, what) => failed(what),
    }
}

/// A machine's CPUs are whole.
fn cpus(size: Size) -> u32 {
    size.cpu_milli.div_ceil(1000).clamp(1, CPUS_MOST)
}

/// What the init evaluates: the environment, and the command as its own arguments.
fn start(spec: &Spec, secrets: &BTreeMap<String, Open>) -> Result<String> {
    if spec.command.is_empty() {
        return Err(refused("a machine's image has no command of its own: name a `command`"));
    }
    let plain = spec.env.iter().map(|(name, value)| (name, value.as_str())).filter(|(name, _)| !secrets.contains_key(*name));
    let open = secrets.iter().map(|(name, value)| (name, value.expose()));
    let mut script = String::new();
    for (name, value) in plain.chain(open) {
        let fits = |(at, c): (usize, char)| c == '_' || c.is_ascii_alphabetic() || at > 0 && c.is_ascii_digit();
        if name.is_empty() || !name.chars().enumerate().all(fits) {
            return Err(refused(format!("`{name}` is no variable's name for a shell")));
        }
        if value.contains('\0') {
            return Err(refused(format!("`{name}` has a zero byte in it")));
        }
        script += &format!("export {name}={}\n", quoted(value));
    }
    if spec.command.iter().any(|word| word.contains('\0')) {
        return Err(refused("the command has a zero byte in it"));
    }
    let words: Vec<String> = spec.command.iter().map(|word| quoted(word)).collect();
    script += &format!("set -- {}\n", words.join(" "));
    // As JSON it is longer, and there is a little around it.
    if json!(script).to_string().len() + 4096 > METADATA_MOST {
        return Err(refused("environment, secrets and command are more than a megabyte"));
    }
    Ok(script)
}

/// One word of a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What the init has said last.
fn ended(console: &[u8]) -> Option<i32> {
    let console = String::from_utf8_lossy(console);
    let (_, after) = console.rsplit_once(ENDED)?;
    let (code, _) = after.split_once(['\r', '\n'])?;
    code.trim().parse().ok()
}

#[cfg(test)]
mod tests;
