//! Every point at which the controller can be stopped is one at which a test stops it.

use anyhow::{Result, ensure};

use crate::repository::Repository;

/// Where the points have their names.
const POINTS: &str = "host/controller/src/fault.rs";
/// Where the tests are that stop the controller.
const TESTS: &str = "tests/e2e/resilience/";
/// There are at least so many; fewer mean that they are not found any more.
const POINTS_MIN: usize = 15;

/// The points that no test names.
pub fn complaints(repository: &Repository) -> Result<Vec<String>> {
    let points = points(&repository.text(POINTS)?);
    ensure!(points.len() >= POINTS_MIN, "only {} fault points are found in {POINTS}", points.len());
    let tests: Vec<&str> = repository
        .files
        .iter()
        .filter(|file| file.path.starts_with(TESTS))
        .map(|file| file.text.as_str())
        .collect();
    let is_named = |point: &String| tests.iter().any(|test| test.contains(&format!("\"{point}\"")));
    Ok(points
        .into_iter()
        .filter(|point| !is_named(point))
        .map(|point| format!("no test in {TESTS} stops the controller at {point:?}"))
        .collect())
}

/// The names in lines like `Self::GuestReady => "guest-ready",`.
fn points(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let (variant, name) = line.trim().split_once(" => \"")?;
        variant.starts_with("Self::").then(|| name.trim_end_matches("\",").to_owned())
    };
    text.lines().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_points_are_found() {
        let text = "match self {\n    Self::GuestReady => \"guest-ready\",\n    other => \"x\",\n}";
        assert_eq!(points(text), ["guest-ready"]);
    }
}
