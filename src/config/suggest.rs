//! Suggestions: the known name that a mistyped one probably means.

use strsim::osa_distance;

/// Length from which a name is not compared, as no known name is nearly as long.
const NAME_BYTES_MAX: usize = 64;

/// Returns the candidate nearest to `name`, unless all differ in more than a third of its letters.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > NAME_BYTES_MAX {
        return None;
    }
    let name = name.to_lowercase();
    let distance_max = (name.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (osa_distance(&name, candidate), candidate))
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Joins words into a choice: `resume, keep or kill`.
pub fn choice(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_edit_is_a_letter_inserted_removed_replaced_or_swapped() {
        for name in ["addr", "adr", "adddr", "abdr", "dadr", "ADDR"] {
            assert_eq!(nearest(name, ["addr"]), Some("addr"), "{name}");
        }
        for name in ["", "ad", "addrxyz", "rdda", "kitten"] {
            assert_eq!(nearest(name, ["addr", "sitting"]), None, "{name}");
        }
    }

    #[test]
    fn words_are_a_choice() {
        for (words, text) in
            [(&["a"][..], "a"), (&["a", "b"], "a or b"), (&["a", "b", "c"], "a, b or c")]
        {
            assert_eq!(choice(words), text);
        }
    }

    #[test]
    fn names_the_nearest_or_none() {
        let names = ["addr", "reject-clients", "threads"];
        assert_eq!(nearest("adr", names), Some("addr"));
        assert_eq!(nearest("reject-client", names), Some("reject-clients"));
        assert_eq!(nearest("thread", names), Some("threads"));
        assert_eq!(nearest("RejectClients", names), Some("reject-clients"));
        assert_eq!(nearest("x", names), None);
        assert_eq!(nearest("colour", names), None);
        assert_eq!(nearest(&"a".repeat(1_000_000), names), None);
    }
}
