//! The rooms of a crate and who uses whom, read from its `crate::` and `super::` paths, and the order that is allowed.
//!
//! A room is a module, usually one at the top of the crate. docs/modules.md lists each crate's rooms in layers, from
//! the top to the bottom: a room may use rooms of its own layer and of those below, and no two rooms may use each
//! other, directly or over others.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

use crate::{
    Violation,
    repository::{File, Language, Repository},
};

/// The page with the tables and the pictures.
pub const PAGE: &str = "docs/modules.md";

/// The crates that have a picture, by their directories.
pub const CRATES: [&str; 3] = ["host/controller", "host/vmm", "agent"];

/// The rooms of a crate, and arrows from each to those that it uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rooms {
    pub rooms: BTreeSet<String>,
    pub arrows: BTreeSet<(String, String)>,
}

/// The layers of a crate from the top to the bottom; each is a list of rooms, given as paths (`edge`,
/// `edge::containerd`).
pub type Layers = Vec<Vec<String>>;

/// Checks the order of every crate.
pub fn check(repository: &Repository) -> Result<Vec<Violation>> {
    let page = repository.text(PAGE)?;
    let mut found = Vec::new();
    for name in CRATES {
        let layers = layers(&page, name)?;
        let rooms = Rooms::of(name, &repository.files, &layers)?;
        found.extend(violations(name, &rooms, &layers));
    }
    Ok(found)
}

/// Reads a crate's table: the rows after `<!-- layers: NAME -->`, with the rooms in backquotes in the first column.
pub fn layers(page: &str, name: &str) -> Result<Layers> {
    let marker = format!("<!-- layers: {name} -->");
    let (_, rest) = page.split_once(&marker).with_context(|| format!("no {marker} in {PAGE}"))?;
    let rows = rest.trim_start().lines().take_while(|line| line.starts_with('|')).skip(2);
    let quoted = |row: &str| -> Vec<String> {
        let cell = row.split('|').nth(1).unwrap_or_default();
        cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    let layers: Layers = rows.map(quoted).collect();
    ensure!(layers.iter().any(|layer| !layer.is_empty()), "no rooms after {marker} in {PAGE}");
    Ok(layers)
}

impl Rooms {
    /// Reads the rooms of the crate in a directory.
    pub fn of(name: &str, files: &[File], layers: &Layers) -> Result<Self> {
        let source = format!("{name}/src/");
        let of_crate =
            |file: &&File| file.language == Language::Rust && !file.is_test && file.path.starts_with(&source);
        let files: Vec<(&File, Vec<String>)> = files
            .iter()
            .filter(of_crate)
            .map(|file| (file, module_path(&file.path[source.len()..])))
            .collect();
        let is_root = |(_, path): &&(&File, Vec<String>)| path.is_empty();
        let root = files.iter().find(is_root).with_context(|| format!("{name} has no lib.rs or main.rs"))?;
        let root = root.0.path[source.len()..].trim_end_matches(".rs").to_owned();
        let top: BTreeSet<String> = files.iter().filter_map(|(_, path)| path.first().cloned()).collect();
        let listed: Vec<&String> = layers.iter().flatten().collect();
        let room_of = |path: &[String]| -> String {
            let Some(first) = path.first().filter(|first| top.contains(*first)) else { return root.clone() };
            let is_prefix = |room: &&&String| {
                let parts: Vec<&str> = room.split("::").collect();
                path.len() >= parts.len() && parts.iter().zip(path).all(|(one, other)| one == other)
            };
            // A module may be in several rooms, one inside the other; the innermost counts.
            let innermost = listed.iter().filter(is_prefix).max_by_key(|room| room.len());
            innermost.map_or_else(|| first.clone(), |room| (**room).clone())
        };
        let mut rooms = Self::default();
        for (file, path) in &files {
            let from = room_of(path);
            rooms.rooms.insert(from.clone());
            for used in used_paths(file, path, &top) {
                let to = room_of(&used);
                if to != from {
                    rooms.arrows.insert((from.clone(), to));
                }
            }
        }
        Ok(rooms)
    }

    /// Groups of rooms that use each other, directly or over others.
    pub fn circles(&self) -> Vec<Vec<String>> {
        let reachable: BTreeMap<&String, BTreeSet<&String>> =
            self.rooms.iter().map(|room| (room, self.reachable(room))).collect();
        let mut circles = BTreeSet::new();
        for room in &self.rooms {
            let with: Vec<String> = reachable[room]
                .iter()
                .filter(|other| reachable.get(**other).is_some_and(|reached| reached.contains(room)))
                .map(|other| (*other).clone())
                .collect();
            if with.len() > 1 {
                circles.insert(with);
            }
        }
        circles.into_iter().collect()
    }

    fn reachable(&self, from: &String) -> BTreeSet<&String> {
        let mut reached = BTreeSet::new();
        let mut open = vec![from];
        while let Some(room) = open.pop() {
            for (_, to) in self.arrows.iter().filter(|(source, _)| source == room) {
                if reached.insert(to) {
                    open.push(to);
                }
            }
        }
        reached
    }
}

/// The path of a file's module in its crate: empty for lib.rs and main.rs.
fn module_path(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" || path == "main" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// The paths in the crate that a module's code names, outside of its tests.
fn used_paths(file: &File, module: &[String], top: &BTreeSet<String>) -> Vec<Vec<String>> {
    let code: String =
        file.rust.iter().filter(|line| !line.is_test).flat_map(|line| [line.code.as_str(), "\n"]).collect();
    let mut used = Vec::new();
    let bases = ["crate", "super", "self"].into_iter().map(str::to_owned);
    // At the root, modules are in scope by their names alone.
    let names: Vec<String> =
        bases.chain(if module.is_empty() { top.iter().cloned().collect() } else { Vec::new() }).collect();
    for name in names {
        for (position, _) in code.match_indices(&format!("{name}::")) {
            let before = code[..position].trim_end();
            let is_part = before.ends_with("::")
                || before.ends_with("(in")
                || code[..position].ends_with(|last: char| last.is_alphanumeric() || last == '_');
            if is_part {
                continue;
            }
            let rest = &code[position + name.len() + 2..];
            let mut base = match name.as_str() {
                "crate" => Vec::new(),
                "super" => module[..module.len().saturating_sub(1)].to_vec(),
                "self" => module.to_vec(),
                top => vec![top.to_owned()],
            };
            let mut rest = rest;
            while let Some(further) = rest.strip_prefix("super::") {
                base.pop();
                rest = further;
            }
            used.extend(tree(rest).into_iter().map(|path| [base.clone(), path].concat()));
        }
    }
    used
}

/// The paths of what follows `crate::`: one, or those of a group in braces.
fn tree(text: &str) -> Vec<Vec<String>> {
    let text = text.trim_start();
    if let Some(group) = text.strip_prefix('{') {
        let mut paths = Vec::new();
        let (mut depth, mut start) = (0, 0);
        for (index, character) in group.char_indices() {
            match character {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    paths.extend(tree(&group[start..index]));
                    start = index + 1;
                    if character == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
        return paths;
    }
    let end =
        text.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    if word.is_empty() {
        return Vec::new();
    }
    let below = rest.strip_prefix("::").map(tree).unwrap_or_default();
    if below.is_empty() || word == "self" {
        return vec![if word == "self" { Vec::new() } else { vec![word.to_owned()] }];
    }
    below.into_iter().map(|path| [vec![word.to_owned()], path].concat()).collect()
}

/// What a crate's rooms violate.
fn violations(name: &str, rooms: &Rooms, layers: &Layers) -> Vec<Violation> {
    let layer_of = |room: &String| layers.iter().position(|layer| layer.contains(room));
    let violation = |rule, what: &str, message: String| Violation {
        rule,
        place: format!("{name}:{what}"),
        line: 0,
        message,
    };
    let mut found = Vec::new();
    for room in rooms.rooms.iter().filter(|room| layer_of(room).is_none()) {
        let message = format!("give the room its layer in {PAGE}");
        found.push(violation("unlisted-room", room, message));
    }
    for (from, to) in &rooms.arrows {
        if let (Some(upper), Some(lower)) = (layer_of(from), layer_of(to))
            && upper > lower
        {
            let message = format!("`{from}` uses `{to}`, which is in a layer above it ({PAGE})");
            found.push(violation("upward-arrow", &format!("{from}->{to}"), message));
        }
    }
    for circle in rooms.circles() {
        let message = "these rooms use each other; move what they share below them".to_owned();
        found.push(violation("circle", &circle.join("+"), message));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crate_of(files: &[(&str, &str)]) -> Vec<File> {
        files
            .iter()
            .map(|(path, text)| File::new(&format!("c/src/{path}"), Language::Rust, text, false))
            .collect()
    }

    fn arrows(files: &[(&str, &str)], layers: &Layers) -> Vec<String> {
        let rooms = Rooms::of("c", &crate_of(files), layers).unwrap();
        rooms.arrows.iter().map(|(from, to)| format!("{from}->{to}")).collect()
    }

    #[test]
    fn arrows_are_read_from_every_kind_of_path() {
        let files = [
            ("lib.rs", "mod a;\nuse a::X;\n"),
            ("a/mod.rs", "use crate::{b::{B, inner::I}, c::C};\n"),
            ("a/inner.rs", "fn f() { super::super::d::run(); self::x(); super::y() }\n"),
            ("b/mod.rs", "// crate::d\nfn f() { \"crate::d\"; crate::f() }\n"),
            ("c.rs", "pub(in crate::b) fn f() {}\n#[cfg(test)]\nmod tests {\n    use crate::d;\n}\n"),
            ("d.rs", ""),
        ];
        assert_eq!(arrows(&files, &Vec::new()), ["a->b", "a->c", "a->d", "b->lib", "lib->a"]);
    }

    #[test]
    fn a_room_may_be_inside_another_module() {
        let files = [("lib.rs", ""), ("a/mod.rs", "use crate::a::deep::D;\n"), ("a/deep.rs", "")];
        assert_eq!(arrows(&files, &vec![vec!["a::deep".to_owned()]]), ["a->a::deep"]);
    }

    #[test]
    fn circles_and_arrows_upward_and_rooms_without_a_layer_are_found() {
        let page = "<!-- layers: c -->\n\n| rooms | |\n|---|---|\n| `lib` | |\n| `a`, `b` | |\n| `d` | |\n\n";
        let layers = layers(page, "c").unwrap();
        assert_eq!(layers, [vec!["lib"], vec!["a", "b"], vec!["d"]]);
        let files = crate_of(&[
            ("lib.rs", ""),
            ("a.rs", "use crate::b;\n"),
            ("b.rs", "use crate::d;\n"),
            ("d.rs", "use crate::a;\n"),
            ("e.rs", ""),
        ]);
        let rooms = Rooms::of("c", &files, &layers).unwrap();
        let found: Vec<_> =
            violations("c", &rooms, &layers).into_iter().map(|found| (found.rule, found.place)).collect();
        let expected = [("unlisted-room", "c:e"), ("upward-arrow", "c:d->a"), ("circle", "c:a+b+d")];
        assert_eq!(found, expected.map(|(rule, place)| (rule, place.to_owned())));
    }
}
