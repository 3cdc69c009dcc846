//! A network's plugins one after the other, as a runtime runs them.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use crate::{
    plugin::{Container, Plugin, REFERENCE},
    testbed::Node,
};

/// The plugins of a list of configurations.
#[derive(Clone, Debug)]
pub struct Chain {
    plugins: Vec<Plugin>,
}

impl Node {
    /// The list that the agent has installed, in the version for runtimes that know no others. Plugins that
    /// are not Penstock's are Debian's.
    pub fn chain(&self) -> Result<Chain> {
        let (_, list) = self.plugins()?;
        let plugins = list.get("plugins").and_then(Value::as_array);
        let plugins = plugins.context("a list without plugins")?;
        let of_list = |name: &str| Some((name.to_owned(), list.get(name)?.clone()));
        let plugins = plugins.iter().map(|plugin| {
            let own = plugin.as_object().context("a plugin is an object")?;
            let common = ["cniVersion", "name"].into_iter().filter_map(of_list);
            let network: Map<String, Value> = own.clone().into_iter().chain(common).collect();
            let kind = own.get("type").and_then(Value::as_str);
            let kind = kind.context("a plugin has no type")?;
            let folders = [self.cni_bin_dir(), PathBuf::from(REFERENCE)];
            let mut folders = folders
                .into_iter()
                .filter(|folder| folder.join(kind).is_file());
            let folder = folders
                .next()
                .with_context(|| format!("no plugin {kind}"))?;
            Ok(Plugin::at(self, folder, kind, network))
        });
        Ok(Chain {
            plugins: plugins.collect::<Result<_>>()?,
        })
    }
}

impl Chain {
    /// Gives a container a network; the last plugin's result.
    pub fn add(&self, container: &Container) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in &self.plugins {
            let asked = plugin.asked(container);
            result = plugin.after(&result).add(&asked)?;
        }
        Ok(result)
    }

    /// Asks whether all of it is as its result says.
    pub fn check(&self, container: &Container, result: &Value) -> Result<()> {
        // Version 1.1.1 of portmap looks among IPv6's rules for IPv4's, and never finds them.
        let plugins = self.plugins.iter().filter(|plugin| !plugin.is("portmap"));
        for plugin in plugins {
            let asked = plugin.asked(container);
            plugin.after(result).call("CHECK", Some(&asked))?;
        }
        Ok(())
    }

    /// Takes it away.
    pub fn del(&self, container: &Container, result: &Value) -> Result<()> {
        for plugin in self.plugins.iter().rev() {
            plugin.after(result).del(&plugin.asked(container))?;
        }
        Ok(())
    }
}
