//! The machine's only file system: a kernel's modules, our binaries, few tools, and an init that
//! runs the tests.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{Binaries, Group, fetch::Image, output_of};

/// What the testbed's networks are made of, each after what it needs; some kernels have them built
/// in.
const MODULES: &[&str] = &["llc", "stp", "bridge", "veth", "sch_ingress", "cls_bpf"];

/// What the testbed calls, beside busybox.
const TOOLS: &[&str] = &["/bin/ip", "/usr/sbin/ethtool", "/sbin/sysctl"];
/// What else the tests and the init call.
const APPLETS: &[&str] = &["sh", "mount", "mkdir", "insmod", "cat", "cut", "reboot"];

/// Where the tests look for programs: a folder that cargo's would be.
const PROGRAMS: &str = "target/debug";

/// Builds the initrd.
pub fn build(image: &Image, binaries: &Binaries, tests: &[Group]) -> Result<PathBuf> {
    // A new folder each time: nothing of an earlier build is booted.
    let folder = tempfile::tempdir_in(&image.folder).context("making a folder")?;
    let tree = Tree {
        root: folder.path(),
    };
    for below in ["proc", "sys", "dev", "tmp", "run", "modules", PROGRAMS] {
        tree.folder(below)?;
    }
    tree.program(Path::new("/bin/busybox"), "bin/busybox")?;
    for applet in APPLETS {
        symlink("busybox", tree.root.join("bin").join(applet)).context("linking an applet")?;
    }
    for tool in TOOLS {
        let tool = Path::new(tool);
        let name = tool.file_name().context("a tool has a name")?;
        tree.program(tool, &format!("bin/{}", name.to_string_lossy()))?;
    }
    let programs = [
        ("penstock", &binaries.agent),
        ("penstock-traffic", &binaries.traffic),
    ];
    let tests_of = binaries.tests.iter().map(|(name, path)| (*name, path));
    for (name, binary) in programs.into_iter().chain(tests_of) {
        let to = format!("{PROGRAMS}/{name}");
        tree.program(binary, &to)?;
        // Debug information would be most of the initrd, and nobody reads it there.
        output_of(Command::new("strip").arg(tree.root.join(to)))?;
    }
    let modules = tree.modules(image)?;
    tree.file("init", &init(&modules, tests))?;
    output_of(
        Command::new("chmod")
            .arg("0755")
            .arg(tree.root.join("init")),
    )?;
    let initrd = image.folder.join("initrd");
    tree.pack(&initrd)?;
    Ok(initrd)
}

/// The file system as a folder.
struct Tree<'a> {
    root: &'a Path,
}

impl Tree<'_> {
    fn folder(&self, below: &str) -> Result<()> {
        let path = self.root.join(below);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))
    }

    fn file(&self, below: &str, text: &str) -> Result<()> {
        let path = self.root.join(below);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    fn copy(&self, from: &Path, below: &str) -> Result<()> {
        let to = self.root.join(below);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        fs::copy(from, &to)
            .map(drop)
            .with_context(|| format!("copying {}", from.display()))
    }

    /// A program with the libraries that it is linked with.
    fn program(&self, from: &Path, below: &str) -> Result<()> {
        self.copy(from, below)?;
        for library in libraries(from)? {
            let below = library.strip_prefix("/").unwrap_or(&library);
            if !self.root.join(below).exists() {
                self.copy(&library, &below.to_string_lossy())?;
            }
        }
        Ok(())
    }

    /// Unpacks the modules that are not built in; their names in the order of loading.
    fn modules(&self, image: &Image) -> Result<Vec<&'static str>> {
        let mut files = Vec::new();
        list(&image.modules, Path::new("kernel"), &mut files)?;
        let mut names = Vec::new();
        for name in MODULES {
            // What is no file is built in; that Debian says so in a file of its own is not certain.
            let Some(below) = find_module(&files, name) else {
                continue;
            };
            let to = self.root.join("modules").join(format!("{name}.ko"));
            unpack(&image.modules.join(below), &to)?;
            names.push(*name);
        }
        Ok(names)
    }

    fn pack(&self, initrd: &Path) -> Result<()> {
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
    for path in super::fetch::entries(&root.join(below)) {
        let name = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
        names.push(name.to_str().context("a name is not text")?.to_owned());
        if path.is_dir() && !path.is_symlink() {
            list(root, &name, names)?;
        }
    }
    Ok(())
}

/// The file among a kernel's that is the module `name`, compressed or not.
fn find_module<'a>(files: &'a [String], name: &str) -> Option<&'a str> {
    let ends = [format!("/{name}.ko"), format!("/{name}.ko.xz")];
    let mut files = files.iter();
    files
        .find(|file| ends.iter().any(|end| file.ends_with(end)))
        .map(String::as_str)
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

/// What runs first: the tests, one process each, reported on the second serial line.
fn init(modules: &[&str], tests: &[Group]) -> String {
    let modules: String = modules
        .iter()
        .map(|name| format!("insmod /modules/{name}.ko || echo \"no module {name}\"\n"))
        .collect();
    let tests: Vec<String> = tests
        .iter()
        .flat_map(|(group, names)| names.iter().map(move |name| format!("{group}:{name}")))
        .collect();
    let tests = tests.join(" ");
    // The tests' own numbers are for a machine that is not emulated. In CI what can't run fails.
    format!(
        "#!/bin/sh\n\
         export PATH=/bin PENSTOCK_PATIENCE=120 PENSTOCK_KILLS=3 CI=1 RUST_BACKTRACE=0\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sys /sys\n\
         mount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmp /tmp\n\
         mount -t tmpfs run /run\n\
         mount -t cgroup2 none /sys/fs/cgroup\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         mkdir -p /run/netns\n\
         exec >/dev/ttyS1 2>&1 </dev/null\n\
         {modules}\
         ip link set lo up\n\
         echo \"@@up\"\n\
         for each in {tests}; do\n\
         test=${{each#*:}}\n\
         began=$(cut -d' ' -f1 /proc/uptime)\n\
         if /{PROGRAMS}/${{each%%:*}} --exact $test --test-threads 1 --nocapture\n\
         then verdict=pass; else verdict=fail; fi\n\
         echo \"@@$verdict $test $began $(cut -d' ' -f1 /proc/uptime)\"\n\
         done\n\
         echo \"@@end\"\n\
         reboot -f\n"
    )
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

    #[test]
    fn modules_are_found_by_their_whole_name() {
        let files = ["kernel/drivers/net/mstp.ko", "kernel/net/802/stp.ko.xz"].map(str::to_owned);
        assert_eq!(find_module(&files, "stp"), Some("kernel/net/802/stp.ko.xz"));
        assert_eq!(find_module(&files, "tp"), None);
    }
}
