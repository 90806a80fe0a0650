//! Name and reason of a pause of `exec`, where the command line gives none.

use std::ffi::OsString;

/// Longest reason that the API takes, and that a fleet does.
pub(super) const REASON_BYTES_MAX: usize = 200;
pub(super) const FLEET_REASON_BYTES_MAX: usize = 100;
/// Longest name of a pause of a fleet.
const FLEET_NAME_BYTES_MAX: usize = 58;

/// Returns the name of a pause that the command line does not name. In a fleet, processes of other hosts have the same number.
pub(super) fn own_name(is_of_fleet: bool) -> String {
    let number = format!("-{}", std::process::id());
    if !is_of_fleet {
        return format!("exec{number}");
    }
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy();
    let is_shown = |letter: &char| letter.is_ascii_alphanumeric() || ".-_".contains(*letter);
    let length = FLEET_NAME_BYTES_MAX - "exec-".len() - number.len();
    let host: String = host.chars().filter(is_shown).take(length).collect();
    format!("exec-{host}{number}")
}

/// Returns the command line as a reason: cut to the longest one, and without characters that the API refuses.
pub(super) fn reason_of(program: &[OsString], bytes_max: usize) -> String {
    let words: Vec<_> = program.iter().map(|word| word.to_string_lossy()).collect();
    let is_shown =
        |letter: char| matches!(letter, '"' | '\'' | '\\') || letter.escape_debug().eq([letter]);
    let mut reason = words.join(" ").replace(|letter| !is_shown(letter), " ");
    let end = (0..=bytes_max).rev().find(|&index| reason.is_char_boundary(index));
    reason.truncate(end.unwrap_or_default());
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_a_fleet_has_the_host_in_it() {
        let (own, fleet) = (own_name(false), own_name(true));
        let number = own.strip_prefix("exec").unwrap();
        assert!(fleet.starts_with("exec-") && fleet.ends_with(number), "{fleet}");
        assert!(fleet.len() <= FLEET_NAME_BYTES_MAX && fleet.len() > own.len(), "{fleet}");
    }

    #[test]
    fn a_reason_is_short_and_can_be_shown() {
        let reason = |words: &[&str]| {
            reason_of(&words.iter().map(OsString::from).collect::<Vec<_>>(), REASON_BYTES_MAX)
        };
        assert_eq!(reason(&["sh", "-c", "a\t'\u{e4}'\n\u{202e}\\"]), "sh -c a '\u{e4}'  \\");
        assert_eq!(reason(&[""]), "");
        // A character of two bytes is not cut in half.
        let long = reason(&["a", &"\u{e4}".repeat(200)]);
        assert_eq!((long.len(), long.chars().count()), (200, 101));
        assert_eq!(reason(&["b", &"a".repeat(1_000)]).len(), REASON_BYTES_MAX);
    }
}
