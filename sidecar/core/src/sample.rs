//! What the processes and the container use: plain numbers, read elsewhere.

use std::time::Duration;

use serde::Serialize;

use crate::metric::*;

/// One reading. What could not be read is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    pub roles: Vec<RoleSample>,
    pub cli: Option<CliSample>,
    /// Who was killed for memory since the reading before, as far as that can be told.
    pub oom_victims: Vec<OomVictim>,
    /// How many more were, and nobody knows who.
    pub oom_unknown: u64,
    pub container: ContainerSample,
    pub sidecar_cpu: Option<Duration>,
    pub sidecar_memory_bytes: Option<u64>,
}

/// Processes of one kind below the sidecar: `cli`, `mcp`, `tool`.
#[derive(Clone, Debug, PartialEq)]
pub struct RoleSample {
    pub role: &'static str,
    pub processes: u64,
    /// Of those, the ones whose parent is gone: they outlived the call that started them.
    pub orphans: u64,
    /// Of those that live and those that have lived.
    pub cpu: Duration,
    pub memory_bytes: u64,
    pub open_fds: Option<u64>,
}

impl RoleSample {
    pub fn new(role: &'static str) -> RoleSample {
        RoleSample { role, processes: 0, orphans: 0, cpu: Duration::ZERO, memory_bytes: 0, open_fds: None }
    }
}

/// A process that the kernel killed for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OomVictim {
    pub role: &'static str,
    /// What it held when it was last seen.
    pub memory_bytes: u64,
}

/// The CLI's own process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CliSample {
    /// As /proc has it.
    pub state: char,
    /// Read only while the CLI works.
    pub sockets: Option<Sockets>,
}

/// Its TCP connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sockets {
    pub established: u32,
    pub connecting: u32,
    /// Of the established, those whose other end has not acknowledged what was sent, though it was sent again.
    pub unanswered: u32,
}

impl Sockets {
    pub fn working(&self) -> u32 {
        self.established.saturating_sub(self.unanswered)
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ContainerSample {
    pub working_set_bytes: Option<u64>,
    pub limit_bytes: Option<u64>,
    pub oom_kills: Option<u64>,
    pub cpu: Option<Duration>,
    /// How long it was kept from using the CPU.
    pub throttled: Option<Duration>,
    /// Processes and threads, how many there may be, and how often that has kept one from being made.
    pub pids: Option<u64>,
    pub pids_limit: Option<u64>,
    pub forks_refused: Option<u64>,
    /// Whether the freezer holds it.
    pub frozen: Option<bool>,
    /// Resource (`cpu`, `memory`, `io`), kind (`some`, `full`), time stalled.
    pub pressure: Vec<(&'static str, &'static str, Duration)>,
}

impl Sample {
    /// CPU time of all processes of a role.
    pub fn cpu(&self, role: &str) -> Duration {
        self.roles.iter().find(|one| one.role == role).map(|role| role.cpu).unwrap_or_default()
    }

    /// What counts against a memory limit: the container's, or else what its processes hold.
    pub fn working_set(&self) -> Option<u64> {
        let resident = || self.roles.iter().map(|role| role.memory_bytes).sum();
        self.container.working_set_bytes.or_else(|| (!self.roles.is_empty()).then(resident))
    }

    /// Sets what it knows.
    #[expect(clippy::cast_precision_loss, reason = "gauges speak in floats")]
    pub fn measure(&self, meters: &mut Meters) {
        for role in &self.roles {
            meters.set(&CHILD_PROCESSES, &[role.role], role.processes as f64);
            meters.set(&RESIDENT_MEMORY, &[role.role], role.memory_bytes as f64);
            meters.raise(&CPU, &[role.role], role.cpu.as_secs_f64());
            if let Some(fds) = role.open_fds {
                meters.set(&OPEN_FDS, &[role.role], fds as f64);
            }
        }
        meters.set(&ORPHANS, &[], self.roles.iter().map(|role| role.orphans).sum::<u64>() as f64);
        let container = &self.container;
        for (metric, value) in [
            (&CONTAINER_WORKING_SET, container.working_set_bytes),
            (&CONTAINER_LIMIT, container.limit_bytes),
            (&SIDECAR_MEMORY, self.sidecar_memory_bytes),
            (&CONTAINER_PROCESSES, container.pids),
            (&CONTAINER_PROCESSES_LIMIT, container.pids_limit),
        ] {
            if let Some(value) = value {
                meters.set(metric, &[], value as f64);
            }
        }
        if let Some(refused) = container.forks_refused {
            meters.raise(&CONTAINER_FORKS_REFUSED, &[], refused as f64);
        }
        if let Some(kills) = container.oom_kills {
            meters.raise(&CONTAINER_OOM_KILLS, &[], kills as f64);
        }
        for (metric, time) in
            [(&CONTAINER_CPU, container.cpu), (&CONTAINER_THROTTLED, container.throttled), (&SIDECAR_CPU, self.sidecar_cpu)]
        {
            if let Some(time) = time {
                meters.raise(metric, &[], time.as_secs_f64());
            }
        }
        for (resource, kind, time) in &container.pressure {
            meters.raise(&CONTAINER_PRESSURE, &[resource, kind], time.as_secs_f64());
        }
    }
}
