//! What a hook is told: a CloudEvents 1.0 document, without what is nobody's business.

use serde_json::json;

use super::Hook;
use crate::config::TEMPLATE_LABEL;
use crate::lifecycle::Phase;
use crate::session::Session;

/// The same for every try, and for nothing else: also where a session comes into a phase again.
pub fn key(session: &Session, phase: Phase, hook: &Hook) -> String {
    let Session { id, generation, since, .. } = session;
    format!("{id}/{generation}/{phase}/{}/{}", since.as_millisecond(), hook.name)
}

/// Neither the environment nor secrets nor what is said in the session is in it.
pub(super) fn of(fleet: &str, session: &Session, phase: Phase, hook: &Hook) -> String {
    let mut data = json!({
        "session": session.id,
        "tenant": session.tenant,
        "owner": session.owner,
        "pattern": session.pattern,
        "provider": session.provider,
        "template": session.spec.labels.get(TEMPLATE_LABEL),
        "image": session.spec.image,
        "generation": session.generation,
        "container": session.key(),
        "phase": phase,
        "since": session.since,
        "created": session.created,
        "ends": session.ends,
        "cost_usd": session.cost_usd(),
        "reason": session.reason,
        "hook": hook.name,
    });
    if let Some(data) = data.as_object_mut() {
        data.retain(|_, value| !value.is_null());
    }
    json!({
        "specversion": "1.0",
        "id": key(session, phase, hook),
        "source": format!("/agent-fleet/{fleet}"),
        "type": format!("dev.agent-fleet.session.{phase}"),
        "subject": session.id,
        "time": session.since,
        "datacontenttype": "application/json",
        "data": data,
    })
    .to_string()
}
