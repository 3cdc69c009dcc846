//! An emulated machine's only file system: a kernel's modules, programs with their libraries, and an
//! init, packed as an initrd.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{
    fetch::{self, Image},
    modules, output_of,
};

/// What the testbed's networks are made of; some kernels have them built in.
pub const NETWORK_MODULES: &[&str] = &["bridge", "veth", "8021q", "sch_ingress", "cls_bpf"];
/// What the testbed calls, beside busybox.
pub const NETWORK_TOOLS: &[&str] = &["/bin/ip", "/usr/sbin/ethtool", "/sbin/sysctl"];
/// What the testbed and an init call of busybox.
pub const APPLETS: &[&str] = &["sh", "mount", "mkdir", "insmod", "cat", "cut", "reboot"];

/// What every init begins with: the kernel's file systems, and a report on the second serial line.
pub const MOUNTS: &str = "\
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/netns
exec >/dev/ttyS1 2>&1 </dev/null
";

/// The file system as a folder.
pub struct Tree<'a> {
    root: &'a Path,
}

impl<'a> Tree<'a> {
    /// An empty one in an empty folder, but for busybox and where kernels mount things.
    pub fn new(root: &'a Path) -> Result<Self> {
        let tree = Self { root };
        for below in ["proc", "sys", "dev", "tmp", "run", "modules"] {
            tree.folder(below)?;
        }
        tree.program(Path::new("/bin/busybox"), "bin/busybox")?;
        for applet in APPLETS {
            symlink("busybox", tree.root.join("bin").join(applet)).context("linking an applet")?;
        }
        Ok(tree)
    }

    /// A folder.
    pub fn folder(&self, below: &str) -> Result<()> {
        let path = self.root.join(below);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))
    }

    /// A copy of a file.
    pub fn copy(&self, from: &Path, below: &str) -> Result<()> {
        let to = self.root.join(below);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        fs::copy(from, &to)
            .map(drop)
            .with_context(|| format!("copying {}", from.display()))
    }

    /// A program with the libraries that it is linked with.
    pub fn program(&self, from: &Path, below: &str) -> Result<()> {
        self.copy(from, below)?;
        for library in libraries(from)? {
            let below = library.strip_prefix("/").unwrap_or(&library);
            if !self.root.join(below).exists() {
                self.copy(&library, &below.to_string_lossy())?;
            }
        }
        Ok(())
    }

    /// One of this workspace's programs. Debug information would be most of the initrd, and nobody
    /// reads it there.
    pub fn stripped(&self, from: &Path, below: &str) -> Result<()> {
        self.program(from, below)?;
        output_of(Command::new("strip").arg(self.root.join(below))).map(drop)
    }

    /// Programs of this machine's, at the same places there.
    pub fn tools(&self, paths: &[&str]) -> Result<()> {
        for path in paths {
            self.program(Path::new(path), path.trim_start_matches('/'))?;
        }
        Ok(())
    }

    /// What runs first.
    pub fn init(&self, text: &str) -> Result<()> {
        let path = self.root.join("init");
        fs::write(&path, text).context("writing the init")?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, mode).context("making the init a program")
    }

    /// Unpacks those modules, and what they depend on, that are not built in; the lines of an init that
    /// load them.
    pub fn modules(&self, image: &Image, wanted: &[&str]) -> Result<String> {
        let mut files = Vec::new();
        list(&image.modules, Path::new("kernel"), &mut files)?;
        let names = modules::order(wanted, |name| {
            // What is no file is built in; that Debian says so in a file of its own is not certain.
            let Some(below) = modules::find(&files, name) else {
                return Ok(None);
            };
            let to = self.root.join("modules").join(format!("{name}.ko"));
            unpack(&image.modules.join(below), &to)?;
            let module = fs::read(&to).with_context(|| format!("reading {}", to.display()))?;
            Ok(Some(modules::depends(&module)))
        })?;
        Ok(names
            .iter()
            .map(|name| format!("insmod /modules/{name}.ko || echo \"no module {name}\"\n"))
            .collect())
    }

    /// Packs it.
    pub fn pack(&self, initrd: &Path) -> Result<()> {
        let output = File::create(initrd).context("making the initrd")?;
        let mut cpio = Command::new("cpio")
            .args(["--create", "--format=newc", "--owner=0:0", "--quiet"])
            .current_dir(self.root)
            .stdin(Stdio::piped())
            .stdout(output)
            .spawn()
            .context("starting cpio")?;
        let mut names = Vec::new();
        list(self.root, Path::new(""), &mut names)?;
        // Dropped at the end of the statement, which is what ends cpio.
        cpio.stdin
            .take()
            .context("no pipe")?
            .write_all(names.join("\n").as_bytes())
            .context("writing to cpio")?;
        let status = cpio.wait().context("waiting for cpio")?;
        anyhow::ensure!(status.success(), "cpio ended with {status}");
        Ok(())
    }
}

/// Every path below `root`, folders before what is in them.
fn list(root: &Path, below: &Path, names: &mut Vec<String>) -> Result<()> {
    for path in fetch::entries(&root.join(below)) {
        let name = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
        names.push(name.to_str().context("a name is not text")?.to_owned());
        if path.is_dir() && !path.is_symlink() {
            list(root, &name, names)?;
        }
    }
    Ok(())
}

/// Copies a module, compressed or not.
fn unpack(module: &Path, to: &Path) -> Result<()> {
    if module.extension().is_some_and(|end| end == "ko") {
        return fs::copy(module, to)
            .map(drop)
            .with_context(|| format!("copying {}", module.display()));
    }
    let file = File::create(to).with_context(|| format!("making {}", to.display()))?;
    let status = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(module)
        .stdout(file)
        .status()
        .context("starting xz")?;
    anyhow::ensure!(status.success(), "xz: {} {status}", module.display());
    Ok(())
}

/// The libraries that a program is linked with; none if it is static.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("starting ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        bail!("{}: {}", program.display(), line.trim());
    }
    Ok(libraries_of(&text))
}

/// The paths in what ldd says.
fn libraries_of(text: &str) -> BTreeSet<PathBuf> {
    text.lines()
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007f8e)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f8e)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f8e)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(
            libraries_of(text),
            expected.iter().map(PathBuf::from).collect()
        );
        assert!(libraries_of("\tnot a dynamic executable\n").is_empty());
    }
}
