//! What an API server's answers look like around the objects, which [`crate::api`] decodes.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::model::object::ObjectName;

/// A page of a list.
#[derive(Deserialize)]
pub(super) struct List<'a> {
    pub(super) metadata: ListMetadata,
    #[serde(borrow, default)]
    pub(super) items: Option<Vec<&'a RawValue>>,
}

/// Where a list stands.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMetadata {
    #[serde(default)]
    pub(super) resource_version: String,
    #[serde(default)]
    pub(super) r#continue: Option<String>,
}

/// A line of a watch.
#[derive(Deserialize)]
pub(super) struct WatchEvent<'a> {
    pub(super) r#type: &'a str,
    #[serde(borrow)]
    pub(super) object: &'a RawValue,
}

/// The object of an event of type ERROR.
#[derive(Default, Deserialize)]
pub(super) struct ErrorObject {
    #[serde(default)]
    pub(super) code: u16,
    #[serde(default)]
    pub(super) message: String,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: VersionedMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VersionedMetadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    resource_version: String,
}

/// The resource version of an object, or of a bookmark, that may be no good otherwise.
pub(super) fn version_of(json: &str) -> Option<String> {
    let metadata = serde_json::from_str::<Versioned>(json).ok()?.metadata;
    (!metadata.resource_version.is_empty()).then_some(metadata.resource_version)
}

/// The name of an object that may be no good otherwise.
pub(super) fn name_of(json: &str) -> Option<ObjectName> {
    let metadata = serde_json::from_str::<Versioned>(json).ok()?.metadata;
    (!metadata.name.is_empty()).then(|| ObjectName::new(metadata.namespace, metadata.name))
}
