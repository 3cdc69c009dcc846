//! What must hold of the source: format, clippy on both sides, audited dependencies, and the
//! house's own rules, which no other tool knows.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, in_root, root, succeeds};

/// Which modules of the agent a module may not know: the state flows one way.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "model",
        &["plan", "dataplane", "watch", "api", "attach", "reconcile"],
    ),
    ("plan", &["watch", "api", "attach", "reconcile"]),
    ("dataplane", &["model", "plan", "watch", "api", "reconcile"]),
    (
        "api",
        &["plan", "dataplane", "watch", "attach", "reconcile"],
    ),
    ("watch", &["plan", "dataplane", "attach", "reconcile"]),
];

/// What is built for the kernel.
const KERNEL_PACKAGES: &[&str] = &["penstock-ebpf", "penstock-bench-ebpf"];

/// Everything, cheapest first.
pub fn all() -> Result<()> {
    house_rules()?;
    in_root(cargo("fmt").args(["--all", "--check"]))?;
    in_root(cargo("clippy").args(["--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    KERNEL_PACKAGES
        .iter()
        .try_for_each(|package| kernel_side(package))?;
    dependencies()
}

/// A kernel side's own configuration: its library is linted on the host with the rest, what only
/// exists for the BPF target by the clippy of the compiler that builds it.
fn kernel_side(package: &str) -> Result<()> {
    let tools = root().join("target/tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(tools).chain(std::env::split_paths(&path)))
        .context("PATH")?;
    let flags = "-D warnings -C debuginfo=2 -C link-arg=--btf -C target-cpu=v3";
    let has_debian = Path::new("/usr/lib/rustlib/src/rust/library/core/Cargo.toml").exists();
    let mut command = if has_debian {
        let mut command = Command::new("/usr/bin/cargo-clippy");
        command
            .arg("clippy")
            .env("CARGO", "/usr/bin/cargo")
            .env("RUSTC", "/usr/bin/rustc")
            .env("RUSTC_BOOTSTRAP", "1");
        command
    } else {
        let mut command = Command::new("rustup");
        command
            .args(["run", "nightly", "cargo", "clippy"])
            .env_remove("CARGO")
            .env_remove("RUSTC");
        command
    };
    in_root(
        command
            .args(["--quiet", "--package", package, "--bin", package])
            .args(["--profile", "ebpf", "--target", "bpfel-unknown-none"])
            .args(["-Z", "build-std=core", "--target-dir"])
            .arg(root().join("target/ebpf-lint"))
            .env("PATH", path)
            .env("RUSTFLAGS", flags)
            .env_remove("RUSTUP_TOOLCHAIN"),
    )
    .with_context(|| format!("{package} must pass clippy without a warning"))
}

/// Licences, sources and duplicates of dependencies; known vulnerabilities where the advisory
/// database can be reached.
fn dependencies() -> Result<()> {
    let tools = root().join("target/tools");
    let deny = tools.join("bin/cargo-deny");
    if !succeeds(Command::new(&deny).arg("--version")) {
        eprintln!("lint: building cargo-deny into target/tools");
        in_root(
            cargo("install")
                .args(["cargo-deny", "--locked", "--root"])
                .arg(&tools)
                .env("CARGO_TARGET_DIR", root().join("target/tools-build")),
        )?;
    }
    in_root(Command::new(&deny).args([
        "--log-level",
        "error",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))?;
    let advisories = ["--log-level", "error", "check", "advisories"];
    if succeeds(
        Command::new(&deny)
            .args(["fetch", "db"])
            .current_dir(root()),
    ) {
        return in_root(Command::new(&deny).args(advisories));
    }
    eprintln!(
        "lint: the advisory database can't be reached from here; \
         `cargo deny check advisories` was NOT run"
    );
    Ok(())
}

/// Pictures and pages that a page shows or leads to, which have to be there.
fn missing_links(page: &Path, text: &str, is_there: impl Fn(&Path) -> bool) -> Vec<String> {
    let folder = page.parent().unwrap_or(page);
    let targets = text
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next());
    targets
        .map(|target| target.split('#').next().unwrap_or_default())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .filter(|target| !is_there(&folder.join(target)))
        .map(|target| format!("{target} is not there"))
        .collect()
}

/// The README and everything under docs/.
fn pages() -> Result<Vec<PathBuf>> {
    let mut pages = vec![root().join("README.md")];
    collect(&root().join("docs"), "md", &mut pages)?;
    Ok(pages)
}

fn house_rules() -> Result<()> {
    let mut problems = Vec::new();
    for page in pages()? {
        let text =
            fs::read_to_string(&page).with_context(|| format!("reading {}", page.display()))?;
        let shown = page.strip_prefix(root()).unwrap_or(&page).display();
        let missing = missing_links(&page, &text, Path::exists);
        problems.extend(missing.iter().map(|link| format!("{shown}: {link}")));
    }
    let mut files = Vec::new();
    for folder in [
        "proxy-common",
        "proxy-ebpf",
        "proxy-agent",
        "cni",
        "image",
        "tests",
        "bench",
        "xtask",
    ] {
        collect(&root().join(folder), "rs", &mut files)?;
    }
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let shown = file.strip_prefix(root()).unwrap_or(&file).to_path_buf();
        problems.extend(
            violations(&shown, &text)
                .into_iter()
                .map(|rule| format!("{}: {rule}", shown.display())),
        );
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("house rules are broken:\n{}", problems.join("\n"))
}

fn collect(folder: &Path, ending: &str, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("reading {}", folder.display()))?
            .path();
        if path.is_dir() {
            collect(&path, ending, files)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == ending)
        {
            files.push(path);
        }
    }
    Ok(())
}

/// What a file breaks.
fn violations(file: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !text.starts_with("//!") {
        found.push("says in no `//!` header what its place is".to_owned());
    }
    for unfinished in [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ] {
        if text.contains(unfinished) {
            found.push(format!("contains {unfinished}"));
        }
    }
    let Ok(module) = file.strip_prefix("proxy-agent/src") else {
        return found;
    };
    let module = module
        .components()
        .next()
        .map(|first| first.as_os_str().to_string_lossy());
    let module = module
        .unwrap_or_default()
        .trim_end_matches(".rs")
        .to_owned();
    for (name, forbidden) in FORBIDDEN.iter().filter(|(name, _)| *name == module) {
        for other in forbidden.iter().filter(|other| imports(text, other)) {
            found.push(format!("{name} must not know {other}"));
        }
    }
    found
}

fn imports(text: &str, module: &str) -> bool {
    let whole = |line: &str| {
        line.split("crate::").skip(1).any(|rest| {
            rest.strip_prefix(module).is_some_and(|tail| {
                !tail.starts_with(|next: char| next.is_alphanumeric() || next == '_')
            })
        })
    };
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .any(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_header_is_named() {
        assert_eq!(
            violations(Path::new("xtask/src/a.rs"), "fn f() {}").len(),
            1
        );
        assert!(violations(Path::new("xtask/src/a.rs"), "//! x\nfn f() {}").is_empty());
    }

    #[test]
    fn a_link_to_nothing_is_named() {
        let text = "[a](a.md) ![b](../b.svg) [c](a.md#part) [d](https://example.org/x) [e](#here)";
        let page = Path::new("docs/page.md");
        let missing = missing_links(page, text, |path| path == Path::new("docs/a.md"));
        assert_eq!(missing, ["../b.svg is not there"]);
    }

    #[test]
    fn an_import_against_the_flow_is_named() {
        let file = Path::new("proxy-agent/src/model/mod.rs");
        assert_eq!(
            violations(file, "//! x\nuse crate::plan::Planner;").len(),
            1
        );
        assert!(violations(file, "//! x\nuse crate::planets::Planner;").is_empty());
        assert!(violations(file, "//! x\n// crate::plan is behind us").is_empty());
    }
}
