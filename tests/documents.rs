//! Documents that must say what the code says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use holdfast::domain::event::Step;
use holdfast::domain::order::Status;

fn text(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_setting_stands_in_operations_with_its_default() {
    let defaults: toml::Table = text("config/default.toml").parse().expect("TOML");
    let operations = text("docs/operations.md");
    let mut missing = Vec::new();
    for (section, settings) in &defaults {
        for (setting, default) in settings.as_table().expect("a section") {
            let row = match default.as_table() {
                Some(_) => format!("| `{section}.{setting}` | `{{}}` |"),
                None => format!("| `{section}.{setting}` | `{default}` |"),
            };
            if !operations.contains(&row) {
                missing.push(row);
            }
        }
    }
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:#?}");
    assert!(!operations.contains("(as above)"), "a setting that does not say what it is");
}

#[test]
fn the_readme_names_files_that_exist() {
    let readme = text("README.md");
    let linked = readme.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
    let files: Vec<_> = linked.filter(|file| !file.starts_with("http")).collect();
    assert!(!files.is_empty());
    for file in files {
        text(file);
    }
}

#[test]
fn the_diagram_of_an_orders_life_shows_each_step_and_no_other() {
    let steps = [
        ("held", Step::Held),
        ("payment_begun", Step::PaymentBegun),
        ("payment_failed", Step::PaymentFailed),
        ("confirmed", Step::Confirmed { released: Vec::new() }),
        ("cancelled", Step::Cancelled),
        ("expired", Step::Expired),
        ("returned", Step::Returned { lines: Vec::new(), restock: true, request: None }),
    ];
    let mut possible = BTreeSet::new();
    for from in [None].into_iter().chain(Status::ALL.map(Some)) {
        for (event, step) in &steps {
            for to in [false, true].into_iter().filter_map(|all_back| step.leads(from, all_back)) {
                let from = from.map_or("[*]", Status::as_str);
                possible.insert(format!("{from} --> {}: {event}", to.as_str()));
            }
        }
    }
    let document = text("docs/orders.md");
    let arrows = document.lines().map(str::trim).filter(|line| line.contains(" --> "));
    let drawn: BTreeSet<_> = arrows.map(str::to_owned).collect();
    assert_eq!(drawn, possible);
}
