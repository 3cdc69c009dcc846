//! The image that nodes run: the agent, and the CNI plugin that it gives to runtimes.

use crate::Image;

/// The folder of its programs, for whoever looks for one by name (`kubectl exec`).
pub const FOLDER: &str = "/usr/bin";
/// What it is called as long as nobody has a registry for it; what `deploy/` names.
pub const NAME: &str = concat!("registry.example/penstock:", env!("CARGO_PKG_VERSION"));

/// The image by a name of one's own.
#[must_use]
pub fn image(name: &str) -> Image<'_> {
    Image {
        name,
        entrypoint: &["/usr/bin/penstock"],
        path: Some(FOLDER),
        stop_signal: None,
        labels: &[
            ("org.opencontainers.image.title", "Penstock"),
            (
                "org.opencontainers.image.version",
                env!("CARGO_PKG_VERSION"),
            ),
            (
                "org.opencontainers.image.licenses",
                env!("CARGO_PKG_LICENSE"),
            ),
        ],
    }
}
