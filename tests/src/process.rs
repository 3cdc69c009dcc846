//! Processes that end with whoever started them.
#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// Where a process runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    /// A network namespace's file.
    pub(crate) namespace: PathBuf,
    /// Folders of cgroups, one a hierarchy; the caller's own where there is none.
    pub(crate) cgroups: Vec<PathBuf>,
    /// A process whose mounts and process ids are to be seen: the first of a Kubernetes node.
    pub(crate) inside: Option<u32>,
}

impl Place {
    /// The program, or what starts it among the mounts and processes that it is to see.
    fn program(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(first) = self.inside else {
            return Command::new(program);
        };
        let mut command = Command::new("nsenter");
        // A process id namespace is for children only: nsenter stays, and must not leave one.
        command
            .args(["--target", &first.to_string()])
            .args(["--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"])
            .args(["setpriv", "--pdeathsig", "KILL", "--"])
            .arg(program);
        command
    }
}

/// A command that will run in `place`, and die with its parent.
pub(crate) fn command(program: impl AsRef<OsStr>, place: &Place) -> Result<Command> {
    let namespace = File::open(&place.namespace)
        .with_context(|| format!("opening {}", place.namespace.display()))?;
    let open = |cgroup: &PathBuf| {
        let path = cgroup.join("cgroup.procs");
        let file = File::options().write(true).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    };
    let cgroups: Vec<File> = place.cgroups.iter().map(open).collect::<Result<_>>()?;
    let mut command = place.program(program);
    command.stdin(Stdio::null());
    let enter = move || {
        // 0 is the writing process itself.
        for mut cgroup in &cgroups {
            cgroup.write_all(b"0")?;
        }
        // SAFETY: plain numbers; both calls are async-signal-safe.
        unsafe {
            if libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) != 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes system calls on descriptors that it owns.
    unsafe { command.pre_exec(enter) };
    Ok(command)
}

/// A running process, killed when dropped.
pub struct Process {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
    name: String,
}

impl Process {
    /// Starts a command whose output is read line by line.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        let name = format!("{command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self {
            child,
            output,
            name,
        })
    }

    /// Starts a command that writes to a file.
    pub(crate) fn start_logging(mut command: Command, log: &Path) -> Result<Self> {
        let name = format!("{command:?}");
        let open = || File::options().create(true).append(true).open(log);
        let file = open().with_context(|| format!("opening {}", log.display()))?;
        let copy = file.try_clone().context("duplicating a descriptor")?;
        let child = command
            .stdout(file)
            .stderr(copy)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self {
            child,
            output: None,
            name,
        })
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> Result<String> {
        let output = self.output.as_mut().context("the output goes elsewhere")?;
        let mut line = String::new();
        if output.read_line(&mut line).context("reading output")? == 0 {
            let status = self.child.wait().context("waiting")?;
            bail!("{} ended with {status} and no further output", self.name);
        }
        Ok(line.trim_end().to_owned())
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("{signal}"))
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(nix::sys::signal::Signal::SIGTERM)?;
        self.child.wait().context("waiting")?;
        Ok(())
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end; what it printed.
pub(crate) fn run(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
