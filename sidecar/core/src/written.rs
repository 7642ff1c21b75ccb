//! Values as people write them, and what they may have meant where they slipped.

use std::time::Duration;

/// `90s`, `10m`, `1h30m`, `500ms`, `2d`.
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    let (mut total, mut rest) = (Duration::ZERO, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |end| digits + end);
        let seconds = match &rest[digits..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3_600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit_end..];
    }
    // A year is no limit any more, but a typo.
    (!text.is_empty() && total <= Duration::from_secs(366 * 86_400)).then_some(total)
}

/// `512MiB`, `2GB`, `1048576`.
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1.0,
        "KiB" | "Ki" => 1024.0,
        "MiB" | "Mi" => 1024.0 * 1024.0,
        "GiB" | "Gi" => 1024.0 * 1024.0 * 1024.0,
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    let bytes = number * unit;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in range")]
    (bytes < 1e18).then_some(bytes as u64)
}

/// The known name that was meant, if one is near: a few edits away, or one that begins like it or has its letters in another order. `core` takes off
/// what names share.
#[must_use]
pub fn near<'a>(name: &str, known: impl Iterator<Item = &'a str>, core: impl Fn(&str) -> &str) -> Option<&'a str> {
    let name = core(name);
    // Short names are near to everything.
    let few = (name.len() / 3).min(3);
    known
        .filter_map(|known| {
            let whole = core(known);
            let begins =
                name.len() >= 4 && whole.starts_with(name) && !whole[name.len()..].starts_with(|c: char| c.is_alphanumeric());
            let edits = edits(name, whole);
            (begins || edits <= few || letters(name) == letters(whole)).then_some((!begins, edits, known))
        })
        .min()
        .map(|(_, _, known)| known)
}

fn letters(text: &str) -> Vec<char> {
    let mut letters: Vec<char> = text.chars().collect();
    letters.sort_unstable();
    letters
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let next = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_have_units_and_ends() {
        for (text, seconds) in [("90s", 90.0), ("1h30m", 5_400.0), ("500ms", 0.5), ("2d", 172_800.0), ("1.5m", 90.0)] {
            assert_eq!(duration(text).unwrap().as_secs_f64(), seconds, "{text}");
        }
        for wrong in ["", "90", "s", "-1s", "1x", "400d", "1e99s"] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
        for (text, bytes) in [("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2GB", 2_000_000_000), ("7", 7), ("1Gi", 1 << 30)] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for wrong in ["", "MiB", "1 XB", "-1", "9999999999GiB"] {
            assert_eq!(size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_slip_is_near_and_another_word_is_not() {
        let known = ["timeout", "retries", "required", "ready_within"];
        let near = |name| near(name, known.iter().copied(), |name| name);
        assert_eq!(near("timout"), Some("timeout"));
        assert_eq!(near("retry"), None);
        assert_eq!(near("reitres"), Some("retries"));
        assert_eq!(near("retires"), Some("retries"));
        assert_eq!(near("ready"), Some("ready_within"));
        assert_eq!(near("colour"), None);
    }
}
