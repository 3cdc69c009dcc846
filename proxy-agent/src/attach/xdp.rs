//! XDP on interfaces to the outside: which of them get it, in which mode, and what is in the way.
//!
//! Invariant: XDP is in addition. An interface without it is served by its TC hooks alone, so that
//! nothing here keeps an interface from being served; and somebody else's program stays where it is.

use aya::{
    Ebpf,
    programs::{
        ProgramError, Xdp,
        links::{FdLink, PinnedLink},
        xdp::{XdpLink, XdpMode},
    },
};

use super::AttachError;
use crate::dataplane::pins::{PinError, Pins};

/// The program.
const PROGRAM: &str = "xdp_uplink";

/// Where packets from the outside are met first (`--xdp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// At the TC hooks.
    Off,
    /// At XDP where the driver has it and nothing speaks against it; else at the TC hooks.
    Auto,
    /// At XDP in the driver; an interface without it is a problem.
    Native,
    /// At XDP in the kernel, which any interface has: to try it, not for speed.
    Generic,
}

/// How the program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the kernel, after a buffer was made.
    Generic,
}

impl Mode {
    const ALL: [Self; 2] = [Self::Native, Self::Generic];

    /// What operators call it.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }

    /// What the kernel calls it.
    const fn of_kernel(self) -> XdpMode {
        match self {
            Self::Native => XdpMode::Driver,
            Self::Generic => XdpMode::Skb,
        }
    }

    /// The pinned link's name. It says the mode, which a link doesn't, and which can't be changed.
    fn pin_name(self, index: u32) -> String {
        format!("if{index}_xdp_{}", self.label())
    }
}

/// What of an interface decides about XDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Facts {
    /// Its Ethernet address, if that is what it has.
    pub mac: Option<[u8; 6]>,
    /// It is one end of a pair.
    pub is_veth: bool,
    /// Other interfaces are its VLANs.
    pub has_vlans: bool,
}

/// Why an interface to the outside has no XDP.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// The kernel does not take the program.
    #[error("XDP: {source}")]
    Load {
        /// Why not.
        #[source]
        source: PinError,
    },
    /// Somebody else was there before.
    #[error("interface {interface} has an XDP program that is not Penstock's, which stays")]
    Taken {
        /// The interface.
        interface: String,
    },
    /// Its VLANs' frames may come without their tags, which the interface keeps beside them.
    #[error("interface {interface} carries VLANs, whose frames XDP can't tell from its own")]
    Vlans {
        /// The interface.
        interface: String,
    },
    /// Frames there have no Ethernet header.
    #[error("interface {interface} has no Ethernet address, which XDP goes by")]
    NotEthernet {
        /// The interface.
        interface: String,
    },
    /// The kernel or the driver refuses.
    #[error(
        "{source}; the driver may have no native XDP (--xdp auto leaves such interfaces to TC)"
    )]
    Attach {
        /// Why.
        #[source]
        source: AttachError,
    },
}

/// The XDP program, if it is wanted and the kernel took it.
pub struct XdpHook {
    choice: Choice,
    problem: Option<String>,
}

/// The program that has to be loaded for a choice.
pub fn program_of(choice: Choice) -> Option<&'static str> {
    (choice != Choice::Off).then_some(PROGRAM)
}

impl XdpHook {
    /// What there is after the program was loaded, if XDP is chosen. Takes it off where it was and no
    /// longer is.
    pub fn new(pins: &Pins, choice: Choice, loaded: Result<(), PinError>) -> Self {
        let wanted = match choice {
            Choice::Off => None,
            Choice::Auto | Choice::Native => Some(Mode::Native),
            Choice::Generic => Some(Mode::Generic),
        };
        let mut hook = Self {
            choice,
            problem: None,
        };
        if let Err(source) = loaded {
            let text = XdpError::Load { source }.to_string();
            tracing::warn!("{text}; clients outside are served at TC");
            hook.problem = Some(text);
        }
        let kept = wanted.filter(|_| hook.problem.is_none());
        for mode in Mode::ALL.into_iter().filter(|mode| Some(*mode) != kept) {
            let suffix = format!("_xdp_{}", mode.label());
            for name in pins.links().iter().filter(|name| name.ends_with(&suffix)) {
                // The last reference to a link detaches it; absent is as good as removed.
                let _ = std::fs::remove_file(pins.link(name));
            }
        }
        hook
    }

    /// What is wrong with XDP as a whole.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Whether interfaces get it.
    pub fn is_wanted(&self) -> bool {
        self.choice != Choice::Off && self.problem.is_none()
    }

    /// Puts XDP on an interface to the outside; `None` where that is not to be.
    pub fn attach(
        &self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        interface: &str,
        index: u32,
        facts: Facts,
    ) -> Result<Option<Mode>, XdpError> {
        let mode = match self.choice {
            Choice::Off => return Ok(None),
            // What one end sends back from XDP, the other loses unless it has a program as well.
            Choice::Auto if facts.is_veth => return Ok(None),
            Choice::Auto | Choice::Native => Mode::Native,
            Choice::Generic => Mode::Generic,
        };
        let interface = interface.to_owned();
        if facts.has_vlans {
            return Err(XdpError::Vlans { interface });
        }
        if facts.mac.is_none() {
            return match self.choice {
                Choice::Auto => Ok(None),
                _ => Err(XdpError::NotEthernet { interface }),
            };
        }
        match attach(ebpf, pins, &interface, index, mode) {
            Ok(()) => Ok(Some(mode)),
            Err(XdpError::Attach { source }) if self.choice == Choice::Auto => {
                tracing::debug!("no XDP: {source}");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Takes XDP off an interface, or forgets one that is gone.
pub(super) fn detach(pins: &Pins, index: u32) {
    for mode in Mode::ALL {
        // Absent is as good as removed.
        let _ = std::fs::remove_file(pins.link(&mode.pin_name(index)));
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, PinError> {
    ebpf.program_mut(PROGRAM)
        .and_then(|program| program.try_into().ok())
        .ok_or(PinError::Missing { name: PROGRAM })
}

fn attach(
    ebpf: &mut Ebpf,
    pins: &Pins,
    interface: &str,
    index: u32,
    mode: Mode,
) -> Result<(), XdpError> {
    let attach = |source: ProgramError| {
        if is_taken(&source) {
            return XdpError::Taken {
                interface: interface.to_owned(),
            };
        }
        XdpError::Attach {
            source: AttachError::Attach {
                program: PROGRAM.to_owned(),
                target: format!("interface {interface}, {}", mode.label()),
                source: Box::new(source),
            },
        }
    };
    let path = pins.link(&mode.pin_name(index));
    let pin = |source: Box<dyn std::error::Error + Send + Sync>| XdpError::Attach {
        source: AttachError::Pin {
            path: path.clone(),
            source,
        },
    };
    let program = program(ebpf).map_err(|source| XdpError::Load { source })?;
    if path.exists() {
        let link: FdLink = PinnedLink::from_pin(&path)
            .map_err(|error| pin(error.into()))?
            .into();
        if let Ok(link) = XdpLink::try_from(link)
            && let Ok(id) = program.attach_to_link(link)
        {
            // The pin holds the link; this handle need not.
            return program.take_link(id).map(drop).map_err(attach);
        }
        // The interface was deleted and another has its index (ENOLINK).
        std::fs::remove_file(&path).map_err(|error| attach(ProgramError::IOError(error)))?;
    }
    let id = program
        .attach_to_if_index(index, mode.of_kernel())
        .map_err(attach)?;
    let link: FdLink = program
        .take_link(id)
        .and_then(|link| {
            link.try_into()
                .map_err(|_| ProgramError::UnexpectedProgramType)
        })
        .map_err(attach)?;
    link.pin(&path).map(drop).map_err(|error| pin(error.into()))
}

/// Whether the kernel says that there is a program already, in this mode (EBUSY) or in another
/// (EEXIST).
fn is_taken(error: &ProgramError) -> bool {
    let ProgramError::SyscallError(error) = error else {
        return false;
    };
    matches!(
        error.io_error.raw_os_error(),
        Some(libc::EBUSY | libc::EEXIST)
    )
}
