//! The pictures in docs/modules.md: drawn from the code, so that they cannot be wrong for long.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use crate::{
    modules::{self, CRATES, Layers, PAGE, Rooms},
    repository::Repository,
};

/// The page as it should be: what people wrote in it, with every picture drawn again.
pub fn page(repository: &Repository) -> Result<String> {
    let mut page = repository.text(PAGE)?;
    for name in CRATES {
        let layers = modules::layers(&page, name)?;
        let rooms = Rooms::of(name, &repository.files, &layers)?;
        page = replace(&page, name, &draw(&rooms, &layers))?;
    }
    Ok(page)
}

/// Puts a picture between the markers of a crate.
fn replace(page: &str, name: &str, picture: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- picture: {name} -->\n"), format!("<!-- end: {name} -->\n"));
    let (before, rest) = page.split_once(&begin).with_context(|| format!("no {} in {PAGE}", begin.trim()))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("no {} in {PAGE}", end.trim()))?;
    Ok(format!("{before}{begin}{picture}{end}{after}"))
}

/// Draws rooms and arrows in Mermaid's language. Dotted arrows are not allowed: they lead upward, or close a circle.
fn draw(rooms: &Rooms, layers: &Layers) -> String {
    let layer_of = |room: &String| layers.iter().position(|layer| layer.contains(room));
    let circles = rooms.circles();
    let mut picture = "```mermaid\ngraph TD\n".to_owned();
    // Writing to a string cannot fail.
    for room in &rooms.rooms {
        let _ = writeln!(picture, "    {}[\"{room}\"]", id(room));
    }
    for (from, to) in &rooms.arrows {
        let leads_up = matches!((layer_of(from), layer_of(to)), (Some(upper), Some(lower)) if upper > lower);
        let is_equal = layer_of(from) == layer_of(to);
        let closes = is_equal && circles.iter().any(|circle| circle.contains(from) && circle.contains(to));
        let arrow = if leads_up || closes { "-.->" } else { "-->" };
        let _ = writeln!(picture, "    {} {arrow} {}", id(from), id(to));
    }
    picture.push_str("```\n");
    picture
}

/// A room's name as Mermaid takes it for a node; `end` and the like are words of its language.
fn id(room: &str) -> String {
    format!("m_{}", room.replace("::", "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_drawn_between_its_markers_and_the_rest_is_left() {
        let page = "one\n<!-- picture: c -->\nold\n<!-- end: c -->\ntwo\n";
        assert_eq!(replace(page, "c", "new\n").unwrap(), page.replace("old", "new"));
        assert!(replace(page, "d", "").is_err());
    }

    #[test]
    fn rooms_and_arrows_are_sorted_and_arrows_upward_are_dotted() {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let rooms = Rooms {
            rooms: ["b::c", "a"].map(str::to_owned).into(),
            arrows: [pair("b::c", "a"), pair("a", "b::c")].into(),
        };
        let layers = vec![vec!["a".to_owned()], vec!["b::c".to_owned()]];
        let lines: Vec<String> = draw(&rooms, &layers).lines().map(str::to_owned).collect();
        let expected = [
            "```mermaid",
            "graph TD",
            "    m_a[\"a\"]",
            "    m_b_c[\"b::c\"]",
            "    m_a --> m_b_c",
            "    m_b_c -.-> m_a",
            "```",
        ];
        assert_eq!(lines, expected);
    }
}
