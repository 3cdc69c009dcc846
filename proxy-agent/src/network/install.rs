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

use penstock_cni::{config::STATE_DIR, state::State, version::Version};
use serde_json::{Map, Value, json};

/// The plugin's name, which is its file's and its type's.
pub const PLUGIN: &str = "penstock-cni";
/// The configuration's file, unless the operator says otherwise. Runtimes take the first by name.
pub const CONFIGURATION: &str = "10-penstock.conflist";

/// A file could not be installed, or taken away.
#[derive(Debug, thiserror::Error)]
#[error("{what} {path}: {source}")]
pub struct InstallError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A plugin that comes after ours, as its file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Chained {
    plugin: Map<String, Value>,
    /// The last version of the specification that it knows.
    version: Version,
}

/// A file does not say which plugin comes after ours.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path}: {reason}; --cni-chain wants a plugin's configuration, like {{\"type\": \"bandwidth\"}}"
)]
pub struct ChainError {
    path: PathBuf,
    reason: String,
}

impl Chained {
    /// Reads a plugin's configuration.
    pub fn read(path: &Path) -> Result<Self, ChainError> {
        let failed = |reason: String| ChainError {
            path: path.to_path_buf(),
            reason,
        };
        let text = fs::read(path).map_err(|error| failed(error.to_string()))?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| failed(format!("it is not JSON ({error})")))?;
        let mut plugin = match value {
            Value::Object(plugin) if plugin.contains_key("plugins") => {
                let reason = "it is a list of plugins (plugins); each needs a file of its own";
                return Err(failed(reason.to_owned()));
            }
            Value::Object(plugin) => plugin,
            _ => return Err(failed("it is no object".to_owned())),
        };
        let version = match plugin.remove("cniVersion") {
            None => Version::V1_0_0,
            Some(version) => Version::of_config(&json!({ "cniVersion": version }))
                .map_err(|error| failed(error.to_string()))?,
        };
        match plugin.get("type").and_then(Value::as_str) {
            None | Some("") => Err(failed("its field type names no plugin".to_owned())),
            Some(PLUGIN) => Err(failed(format!("{PLUGIN} is there already"))),
            Some(name) if name.contains('/') => {
                Err(failed(format!("its type {name} is no name of a plugin")))
            }
            Some(_) => match plugin.get("capabilities") {
                None | Some(Value::Object(_)) => Ok(Self { plugin, version }),
                Some(_) => Err(failed("its field capabilities is no object".to_owned())),
            },
        }
    }

    /// The plugin's name.
    pub fn name(&self) -> &str {
        let name = self.plugin.get("type").and_then(Value::as_str);
        name.unwrap_or_default()
    }

    /// Whether the runtime tells it what a capability of pods' asks for.
    fn has(&self, capability: &str) -> bool {
        let capabilities = self.plugin.get("capabilities");
        capabilities.and_then(|all| all.get(capability)) == Some(&Value::Bool(true))
    }
}

/// Where what is installed.
#[derive(Clone, Debug)]
pub struct Places {
    /// The runtime's configurations.
    pub conf_dir: PathBuf,
    /// The file of ours among them.
    pub conf_name: String,
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
    /// The plugins that come after ours.
    pub chain: Vec<Chained>,
    /// Whether others do, by a configuration that is not installed here.
    pub is_chained: bool,
}

/// Plugins that change no packet's addresses.
const OTHERS: [&str; 2] = ["bandwidth", "tuning"];

/// What runtimes may ask our plugin for.
const CAPABILITIES: [&str; 3] = ["portMappings", "bandwidth", "ips"];

impl Places {
    /// The configuration.
    fn configuration(&self) -> Value {
        // What is asked of two plugins would be done twice.
        let is_ours = |name: &&str| !self.chain.iter().any(|plugin| plugin.has(name));
        let capabilities: Map<String, Value> = CAPABILITIES
            .into_iter()
            .filter(is_ours)
            .map(|name| (name.to_owned(), true.into()))
            .collect();
        let own = json!({
            "type": PLUGIN,
            "capabilities": capabilities,
            "runDir": self.run_dir,
            "stateDir": self.state_dir,
        });
        let others = self
            .chain
            .iter()
            .map(|chained| chained.plugin.clone().into());
        let plugins: Vec<Value> = std::iter::once(own).chain(others).collect();
        let last = self.chain.iter().map(|chained| chained.version).min();
        let last = last.unwrap_or(Version::LATEST);
        let versions = Version::ALL.into_iter().filter(|version| *version <= last);
        let versions: Vec<&str> = versions.map(Version::as_str).collect();
        json!({
            // What runtimes know that don't look at the list. Those that do take the last of it that
            // they know, and ask for STATUS and GC from 1.1.0 on.
            "cniVersion": Version::V1_0_0.min(last).as_str(),
            "cniVersions": versions,
            "name": self.network,
            "plugins": plugins,
        })
    }

    /// Whether other plugins come after ours.
    pub fn has_others(&self) -> bool {
        self.is_chained || !self.chain.is_empty()
    }

    /// Whether any of them may translate packets to pods.
    pub fn has_translators(&self) -> bool {
        let may_translate = |plugin: &Chained| !OTHERS.contains(&plugin.name());
        self.is_chained || self.chain.iter().any(may_translate)
    }

    /// Installs what is missing or different; whether anything was.
    pub fn install(&self) -> Result<bool, InstallError> {
        let mut is_changed = false;
        if let Some(plugin) = &self.plugin {
            let to = self.bin_dir.join(PLUGIN);
            let content = fs::read(plugin).map_err(failed("reading", plugin))?;
            is_changed |= put(&to, &content, 0o755).map_err(failed("installing", &to))?;
        }
        let to = self.conf_dir.join(&self.conf_name);
        let text = format!("{:#}\n", self.configuration());
        is_changed |= put(&to, text.as_bytes(), 0o644).map_err(failed("installing", &to))?;
        Ok(is_changed)
    }
}

/// A configuration that an agent installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    path: PathBuf,
    network: String,
    state_dir: PathBuf,
}

impl Installed {
    /// The one in a file, if it is of the agent with that run directory.
    pub fn find(path: &Path, run_dir: &Path) -> Result<Option<Self>, InstallError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("reading", path)(error)),
        };
        // What is no JSON is not ours.
        let list: Value = serde_json::from_slice(&text).unwrap_or_default();
        let plugins = list.get("plugins").and_then(Value::as_array);
        let ours = plugins.into_iter().flatten().find(|plugin| {
            let says = |key: &str| plugin.get(key).and_then(Value::as_str);
            says("type") == Some(PLUGIN) && says("runDir").map(Path::new) == Some(run_dir)
        });
        let text = |value: Option<&Value>| {
            let text = value.and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        Ok(ours.map(|plugin| Self {
            path: path.to_path_buf(),
            network: text(list.get("name")),
            state_dir: plugin
                .get("stateDir")
                .and_then(Value::as_str)
                .map_or_else(|| PathBuf::from(STATE_DIR), PathBuf::from),
        }))
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the plugin keeps what it gave to whom.
    pub fn state(&self) -> PathBuf {
        State::path(&self.state_dir, &self.network)
    }

    /// Takes it away: no pod is given this network from now on.
    pub fn withdraw(&self) -> Result<(), InstallError> {
        fs::remove_file(&self.path).map_err(failed("removing", &self.path))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_path_buf();
    move |source| InstallError { what, path, source }
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
            conf_name: "05-mine.conflist".to_owned(),
            bin_dir: folder.path().join("bin"),
            plugin: Some(plugin),
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            network: "penstock".to_owned(),
            chain: Vec::new(),
            is_chained: false,
        };
        assert!(places.install().unwrap());
        assert!(!places.install().unwrap());
        let binary = places.bin_dir.join(PLUGIN);
        let mode = binary.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let path = places.conf_dir.join("05-mine.conflist");
        let text = fs::read_to_string(&path).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["plugins"][0]["type"], PLUGIN);
        let files = fs::read_dir(&places.conf_dir).unwrap().count();
        assert_eq!(files, 1);
        let installed = Installed::find(&path, &places.run_dir).unwrap().unwrap();
        assert_eq!(installed.state(), places.state_dir.join("penstock.json"));
        installed.withdraw().unwrap();
        assert_eq!(Installed::find(&path, &places.run_dir).unwrap(), None);
    }

    #[test]
    fn who_comes_after_it_is_asked_instead() {
        let folder = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            let path = folder.path().join("plugin.json");
            fs::write(&path, text).unwrap();
            Chained::read(&path)
        };
        for (text, reason) in [
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[]", "no object"),
            (r#"{"type": "x", "cniVersion": "7.0"}"#, "7.0"),
            ("\"bandwidth\"", "no object"),
            ("{}", "type"),
            (r#"{"type": 7}"#, "type"),
            (r#"{"type": ""}"#, "type"),
            (r#"{"type": "../bandwidth"}"#, "no name"),
            (r#"{"type": "penstock-cni"}"#, "already"),
            (
                r#"{"type": "x", "capabilities": ["bandwidth"]}"#,
                "capabilities",
            ),
            (
                r#"{"name": "x", "plugins": [{"type": "bandwidth"}]}"#,
                "list of plugins",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
            assert!(error.contains("plugin.json"), "{error}");
        }
        let missing = Chained::read(&folder.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("No such file"), "{missing}");
        let bandwidth = r#"{"type": "bandwidth", "capabilities": {"bandwidth": true}}"#;
        let portmap =
            r#"{"type": "portmap", "capabilities": {"portMappings": false}, "snat": true}"#;
        let chain = vec![read(bandwidth).unwrap(), read(portmap).unwrap()];
        let places = Places {
            conf_dir: folder.path().join("net.d"),
            conf_name: CONFIGURATION.to_owned(),
            bin_dir: folder.path().join("bin"),
            plugin: None,
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            network: "penstock".to_owned(),
            chain,
            is_chained: false,
        };
        assert!(places.has_others() && places.has_translators());
        let plugins = &places.configuration()["plugins"];
        // What the second has, it says, it does not want.
        let own = json!({"portMappings": true, "ips": true});
        assert_eq!(plugins[0]["capabilities"], own);
        assert_eq!(
            plugins[1],
            serde_json::from_str::<Value>(bandwidth).unwrap()
        );
        assert_eq!(plugins[2]["snat"], true);
        // What those know whose files do not say what they know.
        let versions = |places: &Places| places.configuration()["cniVersions"].clone();
        assert_eq!(versions(&places), json!(["0.3.1", "0.4.0", "1.0.0"]));
        let newer = r#"{"type": "tuning", "cniVersion": "1.1.0"}"#;
        let newer = Places {
            chain: vec![read(newer).unwrap()],
            ..places.clone()
        };
        assert!(newer.has_others() && !newer.has_translators());
        // Of what others write nothing is known.
        let elsewhere = Places {
            chain: Vec::new(),
            is_chained: true,
            ..places.clone()
        };
        assert!(elsewhere.has_others() && elsewhere.has_translators());
        assert_eq!(versions(&elsewhere)[3], "1.1.0");
        assert_eq!(versions(&newer)[3], "1.1.0");
        assert_eq!(
            newer.configuration()["plugins"][1],
            json!({"type": "tuning"})
        );
        assert!(places.install().unwrap());
        let path = places.conf_dir.join(CONFIGURATION);
        assert!(Installed::find(&path, &places.run_dir).unwrap().is_some());
    }

    #[test]
    fn what_others_installed_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONFIGURATION);
        let other = r#"{"name": "other", "plugins": [{"type": "bridge", "runDir": "/run"}]}"#;
        let elsewhere = r#"{"name": "a", "plugins": [{"type": "penstock-cni", "runDir": "/x"}]}"#;
        for text in ["", "{", "[]", "{}", other, elsewhere] {
            fs::write(&path, text).unwrap();
            let found = Installed::find(&path, Path::new("/run")).unwrap();
            assert_eq!(found, None, "{text}");
        }
    }
}
