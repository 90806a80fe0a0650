//! The policy on packages of others, `.ci/dependencies.json`: under which licences, from where, and each once.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::Path,
    process::Command,
};

use serde::{Deserialize, de::DeserializeOwned};

/// The exceptions that are allowed, each with its reason.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Policy {
    /// Names of SPDX licences.
    licences: BTreeMap<String, String>,
    /// Packages that the program may contain in more than one version.
    duplicates: BTreeMap<String, String>,
}

/// The answer of `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    /// An SPDX expression.
    license: Option<String>,
    /// None for one that lies here.
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    root: String,
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// `dev`, `build` or, for one that the program contains, nothing.
    kind: Option<String>,
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> T {
    serde_json::from_slice(json).unwrap()
}

fn policy() -> Policy {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci/dependencies.json");
    parse(&fs::read(path).unwrap())
}

/// Returns the packages that are built on this machine, the tests' included. All of them have been fetched, as this test
/// was built.
fn metadata() -> Metadata {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let version = String::from_utf8(run(Command::new(&cargo).arg("-vV"))).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    parse(&run(Command::new(&cargo)
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", host])
        .current_dir(env!("CARGO_MANIFEST_DIR"))))
}

/// The values of one key of a lock file, which holds the packages of every system.
fn locked(file: &str, key: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let start = format!("{key} = \"");
    let values = fs::read_to_string(path).unwrap();
    values
        .lines()
        .filter_map(|line| Some(line.strip_prefix(&start)?.trim_end_matches('"').to_owned()))
        .collect()
}

const LOCK_FILES: [&str; 2] = ["Cargo.lock", "tests/fuzz/Cargo.lock"];

#[test]
fn packages_are_from_the_registry() {
    for file in LOCK_FILES {
        let sources: BTreeSet<String> = locked(file, "source").into_iter().collect();
        assert_eq!(sources.len(), 1, "{file}: {sources:?}");
        assert!(sources.iter().all(|source| source.starts_with("registry+")), "{sources:?}");
    }
}

#[test]
fn packages_are_released() {
    for file in LOCK_FILES {
        // The first one is the version of the file. What follows a plus tells of the build.
        let early: Vec<String> = locked(file, "version")
            .into_iter()
            .filter(|version| version.split('+').next().unwrap().contains('-'))
            .collect();
        assert!(early.is_empty(), "{file}: pre-releases: {early:?}");
    }
}

#[test]
fn licences_are_on_the_list() {
    let (policy, metadata) = (policy(), metadata());
    let refused: Vec<String> = metadata
        .packages
        .iter()
        .filter(|package| {
            let licence = package.license.as_deref().unwrap_or_default();
            !is_allowed(licence, &|name| policy.licences.contains_key(name))
        })
        .map(|package| format!("{} {}: {:?}", package.name, package.version, package.license))
        .collect();
    assert!(refused.is_empty(), "no licence of the list:\n{}", refused.join("\n"));
    println!("{} packages, each with a licence of the list", metadata.packages.len());
}

#[test]
fn the_program_contains_each_package_once() {
    let (policy, metadata) = (policy(), metadata());
    let nodes: BTreeMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let (mut open, mut contained) = (vec![metadata.resolve.root.as_str()], BTreeSet::new());
    while let Some(id) = open.pop() {
        if contained.insert(id) {
            let kept = nodes[id].deps.iter().filter(|dependency| {
                dependency.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"))
            });
            open.extend(kept.map(|dependency| dependency.pkg.as_str()));
        }
    }
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in &metadata.packages {
        if contained.contains(package.id.as_str()) {
            assert_eq!(package.source.is_none(), package.name == "tcpause", "{}", package.name);
            versions.entry(&package.name).or_default().push(&package.version);
        }
    }
    let count = versions.len();
    versions.retain(|_, versions| versions.len() > 1);
    let found: Vec<&str> = versions.keys().copied().collect();
    let known: Vec<&str> = policy.duplicates.keys().map(String::as_str).collect();
    assert_eq!(found, known, "more than once: {versions:?}");
    println!("{count} packages are built into the program or its build, each once");
}

/// Returns whether an SPDX expression leaves a choice of which every part is allowed. A slash is how it was written before
/// SPDX.
fn is_allowed(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let verdict = any_of(&mut words, allowed);
    verdict && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

/// AND binds closer than OR. Every part is read, whatever has been found before.
fn any_of(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut verdict = all_of(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        verdict |= all_of(words, allowed);
    }
    verdict
}

fn all_of(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut verdict = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        verdict &= one(words, allowed);
    }
    verdict
}

fn one(words: &mut Words<'_>, allowed: &dyn Fn(&str) -> bool) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let verdict = any_of(words, allowed);
        return verdict && words.next() == Some(")");
    }
    let Some(name) = words.next() else { return false };
    // An exception only ever allows more; none is on the list by itself.
    if words.next_if_eq(&"WITH").is_some() {
        words.next();
    }
    allowed(name)
}

#[test]
fn expressions_of_licences_are_understood() {
    for (expression, expected) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0/MIT", true),
        ("MIT AND GPL-3.0", false),
        ("GPL-3.0 AND MIT OR ISC", true),
        ("GPL-3.0 AND (MIT OR ISC)", false),
        ("(MIT OR GPL-3.0) AND ISC", true),
        ("GPL-3.0 WITH LLVM-exception OR ISC", true),
        ("ISC WITH LLVM-exception", true),
        ("MIT GPL-3.0", false),
        ("(MIT", false),
    ] {
        let verdict = is_allowed(expression, &|name| ["MIT", "ISC"].contains(&name));
        assert_eq!(verdict, expected, "{expression:?}");
    }
}
