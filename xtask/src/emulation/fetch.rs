//! Debian's kernels, fetched once into `target/kernels`.
//!
//! apt does it, so signatures are checked, but with lists of its own: neither the machine's sources
//! nor what is installed there matters, or changes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::output_of;
use crate::run::root;

/// What every suite calls its newest kernel for virtual machines.
const META: &str = "linux-image-cloud-amd64";
const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
pub struct Image {
    /// Its folder below `target/kernels`.
    pub folder: PathBuf,
    /// `uname -r` there.
    pub release: String,
    /// What is booted.
    pub vmlinuz: PathBuf,
    /// Its modules' folder.
    pub modules: PathBuf,
}

/// The kernel of a suite; fetched if it is not there.
pub fn kernel(name: &str, suite: &str) -> Result<Image> {
    let folder = root().join("target/kernels").join(name);
    if let Some(image) = unpacked(&folder) {
        return Ok(image);
    }
    eprintln!(
        "kernels: fetching Debian {suite}'s kernel into {}",
        folder.display()
    );
    let scratch = tempfile::tempdir_in(fresh(&folder)?).context("making a folder")?;
    let apt = Apt::new(scratch.path(), suite)?;
    let packages = apt.packages()?;
    apt.download(&packages)?;
    let debs: Vec<PathBuf> = entries(scratch.path())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "deb"))
        .collect();
    anyhow::ensure!(
        debs.len() == packages.len(),
        "apt fetched {} of {}",
        debs.len(),
        packages.join(" ")
    );
    // Renamed when it is whole, so that what an interrupted run left is never booted.
    let part = scratch.path().join("root");
    for deb in debs {
        output_of(Command::new("dpkg").arg("-x").arg(deb).arg(&part))?;
    }
    fs::rename(&part, folder.join("root")).context("moving what was unpacked")?;
    unpacked(&folder).with_context(|| format!("{} holds no kernel", packages.join(" ")))
}

/// Makes an empty folder.
fn fresh(folder: &Path) -> Result<&Path> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

/// The paths in a folder, in order; none if it is not there.
pub fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// The kernel in a folder, if there is a whole one.
fn unpacked(folder: &Path) -> Option<Image> {
    let root = folder.join("root");
    // Debian moved the modules to /usr, and later the kernel to its modules.
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|below| entries(&root.join(below)).into_iter().next())?;
    let release = modules.file_name()?.to_str()?.to_owned();
    let vmlinuz = [
        root.join("boot").join(format!("vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.exists())?;
    Some(Image {
        folder: folder.to_path_buf(),
        release,
        vmlinuz,
        modules,
    })
}

/// apt with one suite and nothing of this machine's.
struct Apt {
    folder: PathBuf,
    options: Vec<String>,
}

impl Apt {
    fn new(folder: &Path, suite: &str) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is not there (package debian-archive-keyring)");
        }
        for below in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(below)).context("making folders for apt")?;
        }
        let line = format!("deb [signed-by={KEYRING} arch=amd64] {MIRROR} {suite} main\n");
        fs::write(folder.join("sources.list"), line).context("writing a source")?;
        fs::write(folder.join("status"), "").context("writing an empty status")?;
        let at = |option: &str, below: &str| format!("{option}={}/{below}", folder.display());
        let options = vec![
            at("Dir::Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            "Dir::Etc::preferencesparts=-".to_owned(),
            at("Dir::State::lists", "lists"),
            at("Dir::State::status", "status"),
            at("Dir::Cache", "cache"),
            // apt's own user may not read a checkout.
            "APT::Sandbox::User=root".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ];
        let apt = Self {
            folder: folder.to_path_buf(),
            options,
        };
        output_of(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.folder);
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
    }

    /// The packages that make up the suite's kernel: one, or since Linux 7 several.
    fn packages(&self) -> Result<Vec<String>> {
        let text = output_of(self.command("apt-cache").args([
            "depends",
            "--recurse",
            "--no-recommends",
            "--no-suggests",
            "--no-conflicts",
            "--no-breaks",
            "--no-replaces",
            "--no-enhances",
            META,
        ]))?;
        let packages = kernel_packages(&text);
        if packages.is_empty() {
            bail!("{META} depends on no kernel");
        }
        Ok(packages)
    }

    fn download(&self, packages: &[String]) -> Result<()> {
        let mut command = self.command("apt-get");
        output_of(command.args(["-qq", "download"]).args(packages)).map(drop)
    }
}

/// Those lines of `apt-cache depends --recurse` that are a package of a kernel's own.
fn kernel_packages(text: &str) -> Vec<String> {
    let is_kernel = |line: &&str| {
        ["linux-image-", "linux-binary-", "linux-modules-"]
            .iter()
            .any(|start| line.starts_with(start))
            && line.ends_with("-cloud-amd64")
            && *line != META
    };
    let mut packages: Vec<String> = text.lines().filter(is_kernel).map(str::to_owned).collect();
    packages.sort();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_may_be_one_package_or_several() {
        let one = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-50-cloud-amd64\n\
                   linux-image-6.1.0-50-cloud-amd64\n  Depends: kmod\nkmod\nlinux-base\n";
        assert_eq!(kernel_packages(one), ["linux-image-6.1.0-50-cloud-amd64"]);
        let several = "linux-image-cloud-amd64\nlinux-image-7.2-cloud-amd64\n\
                       linux-modules-7.2-cloud-amd64\nlinux-binary-7.2-cloud-amd64\n\
                       linux-base-7.2-cloud-amd64\n";
        assert_eq!(
            kernel_packages(several),
            [
                "linux-binary-7.2-cloud-amd64",
                "linux-image-7.2-cloud-amd64",
                "linux-modules-7.2-cloud-amd64"
            ]
        );
    }
}
