//! The packet hooks, on one interface at a time.
//!
//! TCX links where the kernel has them (Linux 6.6), filters of a clsact qdisc before, and on the links
//! of pods that wait for them; both survive the agent and are replaced in place.

use std::{collections::HashMap, path::PathBuf};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
};

use super::{
    AttachError,
    xdp::{self, Choice, Facts, Mode, XdpError, XdpHook},
};
use crate::dataplane::pins::{PinError, Pins, refused};

/// What is behind an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A pod.
    Pod,
    /// Other nodes, through a tunnel.
    Overlay,
    /// The outside.
    Uplink,
}

/// A program, which its pinned links' names end in, and its direction.
pub(super) type Hook = (&'static str, TcAttachType);

impl Role {
    /// Its hooks.
    pub(super) fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Pod => &[
                ("from_pod", TcAttachType::Ingress),
                ("to_pod", TcAttachType::Egress),
            ],
            Self::Overlay => &[
                ("from_overlay", TcAttachType::Ingress),
                ("to_overlay", TcAttachType::Egress),
            ],
            Self::Uplink => &[
                ("from_uplink", TcAttachType::Ingress),
                ("to_uplink", TcAttachType::Egress),
            ],
        }
    }
}

/// The hooks of all roles.
fn all_hooks() -> impl Iterator<Item = &'static Hook> {
    [Role::Pod, Role::Overlay, Role::Uplink]
        .into_iter()
        .flat_map(Role::hooks)
}

/// Where our filters lie among a clsact qdisc's: early, as other datapaths use 1 and 50 on.
const PRIORITY: u16 = 40;
pub(super) const HANDLE: u32 = 0x9e57;

/// The packet programs, loaded.
pub struct PacketHooks {
    ebpf: Ebpf,
    pins: Pins,
    has_tcx: bool,
    xdp: XdpHook,
}

impl PacketHooks {
    /// Loads the packet programs of `ebpf` for interfaces of these roles, side by side: most of an
    /// agent's start is the kernel's check of them.
    pub fn load(
        mut ebpf: Ebpf,
        pins: Pins,
        has_tcx: bool,
        xdp: Choice,
        roles: &[Role],
    ) -> Result<Self, AttachError> {
        let hooks = || roles.iter().copied().flat_map(Role::hooks);
        let names: Vec<&str> = hooks().map(|(name, _)| *name).collect();
        let at_xdp = xdp::program_of(xdp);
        let results: HashMap<String, Result<(), ProgramError>> = std::thread::scope(|scope| {
            let loading: Vec<_> = ebpf
                .programs_mut()
                .filter(|(name, _)| names.contains(name) || at_xdp == Some(*name))
                .map(|(name, program)| (name.to_owned(), scope.spawn(|| load(program))))
                .collect();
            loading
                .into_iter()
                .map(|(name, thread)| (name, joined(thread)))
                .collect()
        });
        let outcome = |name: &'static str| match results.get(name) {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(refused(name, error)),
            None => Err(PinError::Missing { name }),
        };
        for (name, _) in hooks() {
            outcome(name)?;
        }
        let xdp = XdpHook::new(&pins, xdp, at_xdp.map_or(Ok(()), outcome));
        Ok(Self {
            ebpf,
            pins,
            has_tcx,
            xdp,
        })
    }

    /// XDP as a whole.
    pub fn xdp(&self) -> &XdpHook {
        &self.xdp
    }

    /// Puts XDP on an interface to the outside; `None` where that is not to be.
    pub fn attach_xdp(
        &mut self,
        interface: &str,
        index: u32,
        facts: Facts,
    ) -> Result<Option<Mode>, XdpError> {
        self.xdp
            .attach(&mut self.ebpf, &self.pins, interface, index, facts)
    }

    /// Takes XDP off an interface.
    pub fn detach_xdp(&self, index: u32) {
        xdp::detach(&self.pins, index);
    }

    /// Puts a role's hooks on an interface, `quickly` where somebody waits for it: for a TCX link the
    /// kernel lets an RCU grace period pass, tens of milliseconds, under the lock on all links.
    pub fn attach(
        &mut self,
        role: Role,
        interface: &str,
        index: u32,
        quickly: bool,
    ) -> Result<(), AttachError> {
        for (name, direction) in role.hooks().iter().copied() {
            let pin = self.pins.link(&pin_name(index, name));
            let program = classifier(&mut self.ebpf, name)?;
            let done = if self.has_tcx && (!quickly || pin.exists()) {
                // Afterwards, lest a packet meet neither: one of an agent that was alone there.
                attach_tcx(program, interface, direction, pin)
                    .map(|()| detach_filter(interface, direction))
            } else {
                attach_filter(program, interface, direction)
            };
            done.map_err(|failure| failure.into_error(name, interface))?;
        }
        Ok(())
    }

    /// Takes the hooks off an interface that exists but is no longer wanted, or forgets one that
    /// is gone.
    pub fn detach(&self, interface: Option<&str>, index: u32) {
        for (name, direction) in all_hooks().copied() {
            // The last reference to a link detaches it; absent is as good as removed.
            let _ = std::fs::remove_file(self.pins.link(&pin_name(index, name)));
            if let (false, Some(interface)) = (self.has_tcx, interface) {
                detach_filter(interface, direction);
            }
        }
        self.detach_xdp(index);
    }

    /// The interfaces that pinned links are for.
    pub fn pinned(&self) -> Vec<u32> {
        let mut indices: Vec<u32> = self
            .pins
            .links()
            .iter()
            .filter_map(|name| name.strip_prefix("if")?.split_once('_')?.0.parse().ok())
            .collect();
        indices.sort_unstable();
        indices.dedup();
        indices
    }
}

fn pin_name(index: u32, suffix: &str) -> String {
    format!("if{index}_{suffix}")
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// What a thread ended with; what it panicked with goes on here.
fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, PinError> {
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(PinError::Missing { name })
}

/// What went wrong with one hook on one interface.
enum Failure {
    Attach(ProgramError),
    Pin(PathBuf, Box<dyn std::error::Error + Send + Sync>),
}

impl Failure {
    fn into_error(self, program: &str, interface: &str) -> AttachError {
        match self {
            Self::Attach(source) => AttachError::Attach {
                program: program.to_owned(),
                target: format!("interface {interface}"),
                source: Box::new(source),
            },
            Self::Pin(path, source) => AttachError::Pin { path, source },
        }
    }
}

fn attach_tcx(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
    pin: PathBuf,
) -> Result<(), Failure> {
    if pin.exists() {
        let link: FdLink = PinnedLink::from_pin(&pin)
            .map_err(|source| Failure::Pin(pin.clone(), Box::new(source)))?
            .into();
        if let Ok(link) = SchedClassifierLink::try_from(link)
            && let Ok(id) = program.attach_to_link(link)
        {
            // The pin holds the link; this handle need not.
            return program.take_link(id).map(drop).map_err(Failure::Attach);
        }
        // The interface was deleted and another has its index (ENOLINK).
        std::fs::remove_file(&pin)
            .map_err(|error| Failure::Attach(ProgramError::IOError(error)))?;
    }
    // First on the way from the pod, before anybody else sees the service's address; last on the
    // way to it, after everybody else has.
    let order = match direction {
        TcAttachType::Ingress => LinkOrder::first(),
        _ => LinkOrder::last(),
    };
    let id = program
        .attach_with_options(interface, direction, TcAttachOptions::TcxOrder(order))
        .map_err(Failure::Attach)?;
    let link: FdLink = program
        .take_link(id)
        .and_then(|link| {
            link.try_into()
                .map_err(|_| ProgramError::UnexpectedProgramType)
        })
        .map_err(Failure::Attach)?;
    link.pin(&pin)
        .map(drop)
        .map_err(|source| Failure::Pin(pin.clone(), Box::new(source)))
}

fn attach_filter(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<(), Failure> {
    // One that exists, perhaps somebody else's, will do.
    let _ = tc::qdisc_add_clsact(interface);
    let handle = TcHandle::from(HANDLE);
    let id = match SchedClassifierLink::attached(interface, direction, PRIORITY, handle, None)
        .map_err(ProgramError::IOError)
        .and_then(|link| program.attach_to_link(link))
    {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions {
                priority: PRIORITY,
                handle,
                ..NlOptions::default()
            };
            program
                .attach_with_options(interface, direction, TcAttachOptions::Netlink(options))
                .map_err(Failure::Attach)?
        }
    };
    // Dropping the link would remove the filter, which must outlive this process.
    program
        .take_link(id)
        .map(std::mem::forget)
        .map_err(Failure::Attach)
}

fn detach_filter(interface: &str, direction: TcAttachType) {
    let handle = TcHandle::from(HANDLE);
    // Absent is as good as removed.
    drop(SchedClassifierLink::attached(
        interface, direction, PRIORITY, handle, None,
    ));
}

/// Takes our filters off all interfaces (kernels without TCX); how many there were.
pub fn remove_filters() -> usize {
    let entries = std::fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten();
    let names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    let mut removed = 0;
    for name in names {
        for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
            let handle = TcHandle::from(HANDLE);
            let link = SchedClassifierLink::attached(&name, direction, PRIORITY, handle, None);
            if let Ok(link) = link
                && aya::programs::Link::detach(link).is_ok()
            {
                removed += 1;
            }
        }
    }
    removed
}
