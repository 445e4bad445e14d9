//! Documents that must say what the code says.

use std::fs;
use std::path::Path;

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
