//! The layers of `docs/architecture.md`, checked: who may import whom.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each part of `src/`, and the parts of the crate that it may name.
const MAY_IMPORT: [(&str, &[&str]); 16] = [
    ("domain", &[]),
    ("failpoint", &[]),
    ("config", &["domain"]),
    ("telemetry", &["config"]),
    ("lanes", &["config", "domain"]),
    ("bus", &["config", "domain"]),
    ("ledger", &["config", "domain", "failpoint"]),
    ("relay", &["bus", "config", "domain", "failpoint", "lanes", "ledger"]),
    ("writer", &["bus", "config", "domain", "failpoint", "ledger"]),
    ("sweeper", &["config", "domain", "failpoint", "lanes", "ledger"]),
    ("witness", &["config", "domain", "lanes", "ledger"]),
    ("reconciler", &["bus", "config", "domain", "failpoint", "lanes", "ledger"]),
    ("admission", &["config", "domain", "ledger"]),
    (
        "http",
        &["admission", "config", "domain", "lanes", "ledger", "reconciler", "telemetry", "writer"],
    ),
    (
        "app",
        &[
            "admission",
            "bus",
            "config",
            "domain",
            "http",
            "lanes",
            "ledger",
            "reconciler",
            "relay",
            "sweeper",
            "telemetry",
            "witness",
            "writer",
        ],
    ),
    ("main", &["app", "config", "domain", "ledger"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path())
    {
        if entry.is_dir() {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
}

/// `crate::NAME` and `crate::{NAME, …}`, and `holdfast::NAME` in the binary.
fn imports(text: &str) -> BTreeSet<String> {
    let word =
        |rest: &str| rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
    let mut names = BTreeSet::new();
    for marker in ["crate::", "holdfast::"] {
        for (at, _) in text.match_indices(marker) {
            let rest = &text[at + marker.len()..];
            assert!(!rest.starts_with('{'), "name each part in an import of its own: {rest:.60}");
            names.insert(word(rest));
        }
    }
    names
}

#[test]
fn imports_follow_the_layers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "the sources were found");
    let mut wrong = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).expect("below src");
        let part = path.components().next().expect("a name").as_os_str().to_string_lossy();
        let part = part.trim_end_matches(".rs");
        if part == "lib" {
            continue;
        }
        let allowed = MAY_IMPORT.iter().find(|(name, _)| *name == part);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("src/{part} has no layer yet"));
        let text = fs::read_to_string(&file).expect("text");
        for name in imports(&text) {
            if name != part && !allowed.contains(&name.as_str()) {
                wrong.push(format!("src/{} names {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
