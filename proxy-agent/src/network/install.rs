//! The CNI configuration and the plugin's binary, where runtimes look for them.
//!
//! Both are replaced whole, and the configuration comes last: a runtime takes it for the word that
//! pods can be given a network.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

/// The plugin's name, which is its file's and its type's.
pub const PLUGIN: &str = "penstock-cni";
/// The configuration's file. Runtimes take the first by name.
const CONFIGURATION: &str = "10-penstock.conflist";

/// A file could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("installing {path}: {source}")]
pub struct InstallError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Where what is installed.
#[derive(Clone, Debug)]
pub struct Places {
    /// The runtime's configurations.
    pub conf_dir: PathBuf,
    /// The runtime's plugins.
    pub bin_dir: PathBuf,
    /// The plugin to be installed; none if somebody else does it.
    pub plugin: Option<PathBuf>,
    /// The plugin's state.
    pub state_dir: PathBuf,
    /// Where the plugin finds the agent.
    pub run_dir: PathBuf,
    /// The network's name.
    pub network: String,
}

impl Places {
    /// The configuration.
    fn configuration(&self) -> Value {
        json!({
            "cniVersion": "1.0.0",
            "name": self.network,
            "plugins": [{
                "type": PLUGIN,
                "capabilities": { "portMappings": true, "bandwidth": true },
                "runDir": self.run_dir,
                "stateDir": self.state_dir,
            }],
        })
    }

    /// Installs what is missing or different; whether anything was.
    pub fn install(&self) -> Result<bool, InstallError> {
        let mut is_changed = false;
        if let Some(plugin) = &self.plugin {
            let to = self.bin_dir.join(PLUGIN);
            let content = fs::read(plugin).map_err(failed(plugin))?;
            is_changed |= put(&to, &content, 0o755).map_err(failed(&to))?;
        }
        let to = self.conf_dir.join(CONFIGURATION);
        let text = format!("{:#}\n", self.configuration());
        is_changed |= put(&to, text.as_bytes(), 0o644).map_err(failed(&to))?;
        Ok(is_changed)
    }

    /// Takes the configuration away: no new pod is given this network.
    pub fn withdraw(&self) -> Result<bool, InstallError> {
        let path = self.conf_dir.join(CONFIGURATION);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(&path)(error)),
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_path_buf();
    move |source| InstallError { path, source }
}

/// Makes a file hold this, unless it does.
fn put(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    // A name that no runtime takes for a configuration or a plugin.
    let mut file = tempfile::Builder::new()
        .prefix(".penstock-")
        .tempfile_in(folder)?;
    file.write_all(content)?;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_already_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let plugin = folder.path().join("built");
        fs::write(&plugin, "binary").unwrap();
        let places = Places {
            conf_dir: folder.path().join("net.d"),
            bin_dir: folder.path().join("bin"),
            plugin: Some(plugin),
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            network: "penstock".to_owned(),
        };
        assert!(places.install().unwrap());
        assert!(!places.install().unwrap());
        let binary = places.bin_dir.join(PLUGIN);
        let mode = binary.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let text = fs::read_to_string(places.conf_dir.join(CONFIGURATION)).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["plugins"][0]["type"], PLUGIN);
        let files = fs::read_dir(&places.conf_dir).unwrap().count();
        assert_eq!(files, 1);
        assert!(places.withdraw().unwrap());
        assert!(!places.withdraw().unwrap());
    }
}
