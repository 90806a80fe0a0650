//! Durations in the syntax of Go: `100ms`, `1m30s`, `1.5h`.

use std::time::Duration;

/// The units and their length in nanoseconds, longest first; the second micro sign is the Greek letter.
const UNITS: [(&str, u64); 8] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ns", 1),
];

/// The longest duration in nanoseconds, some 292 years: Go counts them in 64 bits with a sign.
const NANOSECONDS_MAX: u64 = i64::MAX.unsigned_abs();

/// Returns a duration in whole nanoseconds, which fits an atomic. A duration beyond 584 years is cut.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads a duration in the syntax of Go's `time.ParseDuration`, except that a sign is refused.
///
/// The units are `ns`, `us` (`µs`), `ms`, `s`, `m` and `h`. The error names the fault and shows the right form.
///
/// ```
/// # use std::time::Duration;
/// assert_eq!(tcpause::parse_duration("1m30.5s"), Ok(Duration::from_millis(90_500)));
/// assert!(tcpause::parse_duration("30").unwrap_err().contains("did you mean `30s`?"));
/// ```
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    match text {
        "" => return Err("a duration is missing; write one such as `30s` or `1m30s`".to_owned()),
        "0" => return Ok(Duration::ZERO),
        _ => {}
    }
    if text.starts_with(['-', '+']) {
        return Err(format!("{text:?} has a sign; write a duration without one, such as `30s`"));
    }
    let mut nanoseconds = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let (part, after) = parse_part(rest).map_err(|fault| fault.explain(text))?;
        nanoseconds = add(nanoseconds, part).map_err(|fault| fault.explain(text))?;
        rest = after;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// Writes a duration so that [`parse_duration`] reads the same: `1h30m`, `1s500ms`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let mut nanoseconds = duration.as_nanos();
    if nanoseconds == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, length) in UNITS {
        let count = nanoseconds / u128::from(length);
        if count > 0 {
            text.push_str(&count.to_string());
            text.push_str(unit);
            nanoseconds %= u128::from(length);
        }
    }
    text
}

/// Fault of a part of a duration.
enum Fault<'a> {
    NoNumber,
    NoUnit,
    UnknownUnit(&'a str),
    TooLong,
}

impl Fault<'_> {
    fn explain(&self, text: &str) -> String {
        match self {
            Self::NoNumber => {
                format!("{text:?} is not a duration; write one such as `30s` or `1m30s`")
            }
            Self::NoUnit => format!("{text:?} ends without a unit; did you mean `{text}s`?"),
            Self::UnknownUnit(unit) => {
                format!(
                    "{text:?} has the unknown unit {unit:?}; the units are ns, us, ms, s, m and h, as in `1m30s`"
                )
            }
            Self::TooLong => {
                format!("{text:?} is too long; the longest duration is some 292 years")
            }
        }
    }
}

/// Reads one number with its unit; returns its nanoseconds and the rest of the text.
fn parse_part(text: &str) -> Result<(u64, &str), Fault<'_>> {
    let (whole, rest) = split_digits(text);
    let (fraction, rest) = rest.strip_prefix('.').map_or(("", rest), split_digits);
    if whole.is_empty() && fraction.is_empty() {
        return Err(Fault::NoNumber);
    }
    let (unit, rest) =
        rest.split_at(rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len()));
    if unit.is_empty() {
        // At the end, only the unit is missing; before a second point, the number itself is wrong.
        return Err(if rest.is_empty() { Fault::NoUnit } else { Fault::NoNumber });
    }
    let (_, length) =
        UNITS.into_iter().find(|(name, _)| *name == unit).ok_or(Fault::UnknownUnit(unit))?;
    let mut number: u64 = 0;
    for digit in whole.bytes() {
        number = number.checked_mul(10).ok_or(Fault::TooLong)?;
        number = add(number, u64::from(digit - b'0'))?;
    }
    let nanoseconds = number.checked_mul(length).ok_or(Fault::TooLong)?;
    Ok((add(nanoseconds, fraction_of(length, fraction))?, rest))
}

/// Returns the nanoseconds of the digits after the point, for a unit of `length`. As in Go, they are exact for any number of
/// digits.
#[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn fraction_of(length: u64, digits: &str) -> u64 {
    let (mut number, mut scale) = (0_u64, 1.0);
    for digit in digits.bytes() {
        // Further digits are too small to matter, and are ignored, as in Go.
        if number > NANOSECONDS_MAX / 10 {
            break;
        }
        number = number * 10 + u64::from(digit - b'0');
        scale *= 10.0;
    }
    (number as f64 * (length as f64 / scale)) as u64
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

fn add<'a>(left: u64, right: u64) -> Result<u64, Fault<'a>> {
    left.checked_add(right).filter(|sum| *sum <= NANOSECONDS_MAX).ok_or(Fault::TooLong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn reads_what_go_reads() {
        // These are the inputs of the test of Go's standard library, and a few more.
        for (text, nanoseconds) in [
            ("0", 0),
            ("5s", 5 * SECOND),
            ("30s", 30 * SECOND),
            ("1478s", 1478 * SECOND),
            ("5.0s", 5 * SECOND),
            ("5.6s", 5_600_000_000),
            ("5.s", 5 * SECOND),
            (".5s", 500_000_000),
            ("1.0s", SECOND),
            ("1.00s", SECOND),
            ("1.004s", 1_004_000_000),
            ("1.0040s", 1_004_000_000),
            ("100.00100s", 100_001_000_000),
            ("10ns", 10),
            ("11us", 11_000),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("13ms", 13_000_000),
            ("14s", 14 * SECOND),
            ("15m", 15 * 60 * SECOND),
            ("16h", 16 * 3600 * SECOND),
            ("3h30m", 12_600 * SECOND),
            ("10.5s4m", 250_500_000_000),
            ("2m3.4s", 123_400_000_000),
            ("1h2m3s4ms5us6ns", 3_723_004_005_006),
            ("39h9m14.425s", 140_954_425_000_000),
            ("30m1h", 5_400 * SECOND),
            ("1s1s", 2 * SECOND),
            ("52763797000ns", 52_763_797_000),
            ("0.3333333333333333333h", 1_200 * SECOND),
            ("9007199254740993ns", 9_007_199_254_740_993),
            ("9223372036854775807ns", NANOSECONDS_MAX),
            ("9223372036854775.807us", NANOSECONDS_MAX),
            ("9223372036s854ms775us807ns", NANOSECONDS_MAX),
            ("0.100000000000000000000h", 360 * SECOND),
            ("0.830103483285477580700h", 2_988_372_539_827),
            ("0s", 0),
            ("0000000000000000000000001s", SECOND),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanoseconds)), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_wrong_and_says_why() {
        for (text, part) in [
            ("", "is missing"),
            ("30", "did you mean `30s`?"),
            ("1.5", "did you mean `1.5s`?"),
            ("1m30", "did you mean `1m30s`?"),
            ("1..5s", "is not a duration"),
            ("00", "did you mean `00s`?"),
            ("-5s", "has a sign"),
            ("+5s", "has a sign"),
            ("-", "has a sign"),
            ("s", "is not a duration"),
            (".", "is not a duration"),
            (".s", "is not a duration"),
            (" 5s", "is not a duration"),
            ("soon", "is not a duration"),
            ("3h.", "is not a duration"),
            ("1d", "unknown unit \"d\""),
            ("5 s", "unknown unit \" s\""),
            ("5s ", "unknown unit \"s \""),
            ("5S", "unknown unit \"S\""),
            ("1e3s", "unknown unit \"e\""),
            ("1s-1s", "unknown unit \"s-\""),
            ("5s\n", "\"5s\\n\" has the unknown unit"),
            ("9223372036854775808ns", "is too long"),
            ("9223372036854775.808us", "is too long"),
            ("9223372036854775807ns1ns", "is too long"),
            ("3000000h", "is too long"),
            ("99999999999999999999999s", "is too long"),
        ] {
            let error = parse_duration(text).expect_err(text);
            assert!(error.contains(part), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error:?}");
        }
    }

    #[test]
    fn formats_every_unit() {
        for (text, nanoseconds) in [
            ("0s", 0),
            ("10s", 10 * SECOND),
            ("100ms", 100_000_000),
            ("1m30s", 90 * SECOND),
            ("1h", 3600 * SECOND),
            ("1s500ms", 1_500_000_000),
            ("7us8ns", 7_008),
        ] {
            assert_eq!(format_duration(Duration::from_nanos(nanoseconds)), text);
        }
    }

    #[test]
    fn what_is_formatted_reads_the_same() {
        let seed = 0x7463_7061_7573_6531;
        let mut state: u64 = seed;
        for round in 0..20_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // All magnitudes are equally likely, from a few nanoseconds to 292 years.
            let duration = Duration::from_nanos((state >> 1) >> (round % 63));
            let text = format_duration(duration);
            assert_eq!(parse_duration(&text), Ok(duration), "{text}, seed {seed}, round {round}");
        }
    }
}
