//! What a container and its fleet know each other by: made of the container's name and a secret of the fleet, so that it is kept nowhere.

use std::fmt;

use ring::hmac;

/// The fleet's secret.
#[derive(Clone)]
pub struct Tokens(hmac::Key);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Another use of the same secret would have another.
const PURPOSE: &str = "agent-fleet container ";

impl Tokens {
    pub fn new(secret: &str) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()))
    }

    /// Of the container that is called so.
    pub fn of(&self, key: &str) -> String {
        let tag = hmac::sign(&self.0, format!("{PURPOSE}{key}").as_bytes());
        tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether a token is that container's, in a time that does not depend on how much of it is right.
    pub fn is_of(&self, key: &str, token: &str) -> bool {
        let pairs =
            (0..token.len()).step_by(2).map(|at| token.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()));
        let Some(bytes) = pairs.collect::<Option<Vec<u8>>>() else { return false };
        hmac::verify(&self.0, format!("{PURPOSE}{key}").as_bytes(), &bytes).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_one_container_of_one_fleet() {
        let (ours, theirs) = (Tokens::new("0123456789abcdef0123456789abcdef"), Tokens::new("fedcba9876543210fedcba9876543210"));
        let token = ours.of("agent-1-1");
        assert_eq!((token.len(), token == ours.of("agent-1-1")), (64, true));
        assert!(ours.is_of("agent-1-1", &token));
        assert!(!ours.is_of("agent-1-2", &token) && !theirs.is_of("agent-1-1", &token));
        for wrong in ["", "0", "zz", &token[..62], &token.replace('0', "é"), &format!("{token}00")] {
            assert!(!ours.is_of("agent-1-1", wrong) || *wrong == *token, "{wrong}");
        }
        assert!(!format!("{ours:?}").contains("0123"));
    }
}
