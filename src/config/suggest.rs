//! The known name that a mistyped one probably means.

/// A longer name is compared with nothing: none of ours is nearly as long.
const NAME_BYTES_MAX: usize = 64;

/// The candidate nearest to `name`, unless all are too far away to be what was meant.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > NAME_BYTES_MAX {
        return None;
    }
    let name = name.to_lowercase();
    // A third of the letters may be wrong.
    let distance_max = (name.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (distance(&name, candidate), candidate))
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The words as a choice: `resume, keep or kill`.
pub fn choice(words: &[&str]) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

/// How many letters must be inserted, removed, replaced or swapped with their neighbour to turn one name into the other.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=right.len()).collect();
    let mut previous_letter = None;
    for (row, letter) in left.chars().enumerate() {
        let mut current = vec![row + 1];
        for (column, other) in right.iter().enumerate() {
            let at =
                |line: &[usize], index: usize| line.get(index).copied().unwrap_or(usize::MAX - 1);
            let mut best = at(&last, column) + usize::from(letter != *other);
            best = best.min(at(&last, column + 1) + 1).min(at(&current, column) + 1);
            if let Some(before) = column.checked_sub(1)
                && right.get(before) == Some(&letter)
                && previous_letter == Some(*other)
            {
                best = best.min(at(&before_last, before) + 1);
            }
            current.push(best);
        }
        before_last = std::mem::replace(&mut last, current);
        previous_letter = Some(letter);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_edits() {
        for (left, right, edits) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("addr", "addr", 0),
            ("adr", "addr", 1),
            ("adddr", "addr", 1),
            ("abdr", "addr", 1),
            ("dadr", "addr", 1),
            ("kitten", "sitting", 3),
        ] {
            assert_eq!(distance(left, right), edits, "{left} {right}");
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
