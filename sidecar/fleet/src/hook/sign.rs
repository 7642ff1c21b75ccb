//! Signatures by the Standard Webhooks scheme: who holds the secret knows that it was us, when, and that nothing was changed.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

/// A shared secret: `whsec_` and base64.
#[derive(Clone)]
pub struct Key(hmac::Key);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Key {
    /// # Errors
    /// What is wrong, as the end of a sentence that begins with where it is from: it does not say what it is.
    pub fn of(text: &str) -> Result<Key, &'static str> {
        let encoded = text.trim().strip_prefix("whsec_").ok_or("does not begin with `whsec_`")?;
        let bytes = STANDARD.decode(encoded).map_err(|_| "is not in base64 after `whsec_`")?;
        match bytes.len() {
            24..=64 => Ok(Key(hmac::Key::new(hmac::HMAC_SHA256, &bytes))),
            _ => Err("is not of 24 to 64 bytes, as the scheme wants it"),
        }
    }
}

/// The header `webhook-signature`: one of each key, so that a receiver that knows the old or the new one takes it.
pub fn signatures(keys: &[Key], id: &str, timestamp: i64, body: &str) -> String {
    let signed = format!("{id}.{timestamp}.{body}");
    let one = |Key(key): &Key| format!("v1,{}", STANDARD.encode(hmac::sign(key, signed.as_bytes())));
    keys.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the scheme's own libraries.
    #[test]
    fn what_is_signed_is_what_the_scheme_says() {
        let key = Key::of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let one =
            signatures(std::slice::from_ref(&key), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(one, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        let other = Key::of("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD").unwrap();
        let two = signatures(&[other, key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert!(two.ends_with(&one) && two.len() == 2 * one.len() + 1, "{two}");
    }

    #[test]
    fn a_secret_that_is_none_is_told_without_being_said() {
        for (wrong, why) in
            [("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_"), ("whsec_!!!", "base64"), ("whsec_c2hvcnQ=", "24 to 64")]
        {
            assert!(Key::of(wrong).unwrap_err().contains(why), "{wrong}");
        }
        assert_eq!(format!("{:?}", Key::of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap()), "(hidden)");
    }
}
