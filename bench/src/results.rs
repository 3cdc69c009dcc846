//! What was measured, as files: all of it as JSON, and from that a report and pictures.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{machine::Machine, plot, report, turns::Outcome};

/// Everything of one run.
#[derive(Serialize, Deserialize)]
pub struct Results {
    /// Where and when.
    pub machine: Machine,
    /// What was compared.
    pub outcomes: Vec<Outcome>,
    /// What programming takes, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Value>,
    /// What packets cost in each program, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub programs: Option<Value>,
}

impl Results {
    /// Nothing yet.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            outcomes: Vec::new(),
            control: None,
            programs: None,
        }
    }

    /// Reads an earlier run's.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is no result", path.display()))
    }

    /// Writes NAME.json, NAME.md and the pictures that it shows; their paths.
    pub fn write(&self, folder: &Path, name: &str) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut files = Vec::new();
        let mut plots = Vec::new();
        for title in self.titles() {
            let outcomes: Vec<&Outcome> = self
                .outcomes
                .iter()
                .filter(|one| one.title == title)
                .collect();
            let file = format!("{name}-{}.svg", slug(title));
            let path = folder.join(&file);
            plot::draw(&path, title, &outcomes)?;
            plots.push((title.to_owned(), file));
            files.push(path);
        }
        let json = serde_json::to_string(self).context("writing JSON")? + "\n";
        for (end, text) in [("json", json), ("md", report::markdown(self, &plots))] {
            let path = folder.join(format!("{name}.{end}"));
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            files.push(path);
        }
        Ok(files)
    }

    /// The titles of comparisons, in their order.
    fn titles(&self) -> Vec<&str> {
        let mut titles: Vec<&str> = Vec::new();
        for outcome in &self.outcomes {
            if !titles.contains(&outcome.title.as_str()) {
                titles.push(&outcome.title);
            }
        }
        titles
    }
}

/// A title as part of a file's name.
fn slug(title: &str) -> String {
    let words = title
        .split(|character: char| !character.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_become_names_of_files() {
        assert_eq!(slug("Pods on one node"), "pods-on-one-node");
        assert_eq!(slug("5,000 services, last"), "5-000-services-last");
    }
}
