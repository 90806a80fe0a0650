//! Words of real connections with each fact and number altered: it arrives so, and nothing else with it.

use serde_json::Value;

use super::*;

/// Facts that the words of a struct leave out while they are false, by a field that it always has.
const LEFT_OUT: [(&str, &[&str]); 4] = [
    ("socket", &["readable", "writable", "read_closed", "reset", "vanished", "urgent"]),
    ("begun", &["is_short", "bypasses"]),
    ("moved", &["bypasses"]),
    ("stage", &["bulk"]),
];

#[test]
fn each_fact_and_number_arrives_by_itself() {
    let taker = Taker::new();
    for scene in scenes() {
        let (words, ..) = parcel(&scene.connection, taker.bench.now);
        let words = serde_json::to_value(&words).unwrap();
        let altered = altered(&words);
        assert!(altered.len() > 8, "{words}");
        for words in altered {
            let (_, descriptors, bytes) = parcel(&scene.connection, taker.bench.now);
            let arrived = serde_json::from_value(words.clone()).unwrap();
            let rebuilt = taker.rebuild(arrived, descriptors, bytes);
            let (again, ..) = parcel(&rebuilt, taker.begin);
            assert_eq!(serde_json::to_value(&again).unwrap(), words);
        }
    }
}

/// Returns `words` as often as there are facts and numbers in them, each time with another one altered. Those that tell of
/// raw bytes stay.
fn altered(words: &Value) -> Vec<Value> {
    match words {
        Value::Bool(fact) => vec![(!fact).into()],
        Value::Number(number) => vec![(number.as_i64().unwrap() + 1).into()],
        Value::Null | Value::String(_) => Vec::new(),
        Value::Array(list) => {
            let at = |index| altered(&list[index]).into_iter().map(move |it| (index, it));
            let with = |(index, it)| {
                let mut list = list.clone();
                list[index] = it;
                list.into()
            };
            (0..list.len()).flat_map(at).map(with).collect()
        }
        Value::Object(fields) => {
            let stays = |key: &str| ["bytes", "pipe", "unsent"].contains(&key);
            let present = fields.iter().filter(|(key, _)| !stays(key)).flat_map(|(key, value)| {
                altered(value).into_iter().map(move |value| (key.clone(), value))
            });
            let left_out = LEFT_OUT.iter().filter(|(mark, _)| fields.contains_key(*mark));
            let left_out = left_out.flat_map(|(_, names)| names.iter());
            let left_out = left_out.map(|&name| (name.to_owned(), Value::Bool(true)));
            let with = |(key, value)| {
                let mut fields = fields.clone();
                fields.insert(key, value);
                // A fact is left out while it is false.
                let is_left_out = |key: &str| LEFT_OUT.iter().any(|(_, it)| it.contains(&key));
                fields.retain(|key, value| *value != Value::Bool(false) || !is_left_out(key));
                fields.into()
            };
            present.chain(left_out).map(with).collect()
        }
    }
}
