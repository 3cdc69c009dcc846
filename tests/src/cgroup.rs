//! Where cgroups are made, and how they are removed.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::eventually;

/// A mounted cgroup1 hierarchy. Kubernetes limits pods there wherever the machine keeps its
/// controllers there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Where it is mounted.
    pub(crate) root: PathBuf,
    /// What to mount it by: its controllers, or its name.
    pub(crate) options: String,
}

/// Where the cgroup2 hierarchy is.
pub(crate) fn unified() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(fields.get(1).unwrap_or(&"")))
    });
    found.context("no cgroup2 is mounted")
}

/// The cgroup1 hierarchies; none on most machines.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    Ok(mounts.lines().filter_map(hierarchy).collect())
}

/// One of a line of /proc/mounts.
fn hierarchy(line: &str) -> Option<Hierarchy> {
    let mut fields = line.split(' ');
    let (_, root, kind, options) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let is_general = |option: &&str| {
        !["rw", "ro", "relatime", "nosuid", "nodev", "noexec", "xattr"].contains(option)
            && !option.starts_with("release_agent=")
    };
    let options: Vec<&str> = options.split(',').filter(is_general).collect();
    (kind == "cgroup").then(|| Hierarchy {
        root: root.into(),
        options: options.join(","),
    })
}

impl Hierarchy {
    /// Makes a cgroup in it that takes processes.
    pub(crate) fn make(&self, name: &str) -> Result<PathBuf> {
        let cgroup = self.root.join(name);
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        // A new cpuset is empty, and nothing runs on no processor.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = cgroup.join(file);
            if own.exists() {
                let all =
                    fs::read(self.root.join(file)).with_context(|| format!("reading {file}"))?;
                fs::write(&own, all).with_context(|| format!("writing {}", own.display()))?;
            }
        }
        Ok(cgroup)
    }
}

/// Lets the cgroups below a cgroup2 have all its controllers.
pub(crate) fn delegate(cgroup: &Path) -> Result<()> {
    let read = |file: &str| {
        fs::read_to_string(cgroup.join(file)).with_context(|| format!("reading {file}"))
    };
    let (all, given) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let mut missing = all.split_whitespace().filter(|one| !given.contains(one));
    missing.try_for_each(|controller| {
        fs::write(
            cgroup.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .with_context(|| format!("delegating controller {controller}"))
    })
}

/// Kills what is left in a cgroup2 of ours.
pub(crate) fn end_processes(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            end_processes(&entry.path());
        }
    }
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
}

/// Removes a cgroup and all below, once their processes have ended.
pub(crate) fn remove(cgroup: &Path) -> Result<()> {
    eventually("the cgroup is empty", || remove_now(cgroup))
        .with_context(|| format!("removing {}", cgroup.display()))
}

fn remove_now(cgroup: &Path) -> Result<()> {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_now(&entry.path())?;
        }
    }
    match fs::remove_dir(cgroup) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_cgroup1_are_told_from_others() {
        let line = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0";
        let expected = Hierarchy {
            root: "/sys/fs/cgroup/cpu,cpuacct".into(),
            options: "cpu,cpuacct".into(),
        };
        assert_eq!(hierarchy(line), Some(expected));
        let named = "cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0";
        assert_eq!(hierarchy(named).unwrap().options, "name=systemd");
        assert_eq!(hierarchy("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0"), None);
    }
}
