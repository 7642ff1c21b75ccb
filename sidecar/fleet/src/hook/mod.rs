//! What others have a say in: commands and webhooks that run when a session comes into a phase.

use std::fmt;
use std::time::Duration;

use crate::config::{TEMPLATE_LABEL, time};
use crate::lifecycle::Phase;
use crate::provider::Secret;
use crate::session::Session;

pub mod sign;

/// Something that is run on phases.
#[derive(Clone, Debug, PartialEq)]
pub struct Hook {
    /// In the log and in what makes a run the same when it is tried again.
    pub name: String,
    pub on: Vec<Phase>,
    /// For sessions of these alone. Empty: of all.
    pub templates: Vec<String>,
    pub act: Act,
    /// For one try.
    pub timeout: Duration,
    /// How often it is tried again.
    pub retries: u32,
    /// Where it fails, so does the step. Where not, the step goes on and it is tried again beside it.
    pub required: bool,
    /// Its no is heard, where one can be.
    pub veto: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    Command {
        /// The program's whole path and its arguments.
        argv: Vec<String>,
        /// Variables of the fleet's environment that it gets.
        pass: Vec<String>,
    },
    Webhook {
        url: String,
        /// Each signs: the old and the new one, while one replaces the other.
        secrets: Vec<Secret>,
    },
}

impl Hook {
    /// Whether it runs for this session on this phase.
    pub fn is_for(&self, session: &Session, phase: Phase) -> bool {
        let template = session.spec.labels.get(TEMPLATE_LABEL);
        self.on.contains(&phase) && (self.templates.is_empty() || template.is_some_and(|name| self.templates.contains(name)))
    }

    /// Whether a no of its is heard there.
    pub fn may_veto(&self, phase: Phase) -> bool {
        self.veto && phase.can_be_vetoed()
    }
}

/// As it could be written.
impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Hook { name, on, templates, act, timeout, retries, required, veto } = self;
        let on: Vec<&str> = on.iter().map(|phase| phase.as_str()).collect();
        writeln!(f, "[[hooks]]\nname = {name:?}\non = {on:?}")?;
        if !templates.is_empty() {
            writeln!(f, "templates = {templates:?}")?;
        }
        match act {
            Act::Command { argv, pass } => writeln!(f, "command = {argv:?}\npass = {pass:?}")?,
            Act::Webhook { url, .. } => writeln!(f, "webhook = {url:?}")?,
        }
        write!(f, "timeout = {}\nretries = {retries}\nrequired = {required}\nveto = {veto}", time(*timeout))
    }
}
