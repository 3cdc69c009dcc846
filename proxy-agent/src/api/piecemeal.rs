//! Lists of which an item can't be decoded: each item by itself, so that one that is wrong costs no other.
//!
//! Only asked for documents that were refused as a whole, since it takes more time and memory.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

use super::{cut, name_in, raw::Raw};

/// A list.
pub(super) struct List {
    /// Its kind, such as "List" or "ServiceList".
    pub(super) kind: String,
    /// Its version.
    pub(super) version: String,
    /// Its items.
    pub(super) items: Vec<Result<Raw, Broken>>,
}

/// An item that can't be decoded.
pub(super) struct Broken {
    /// Its kind, as far as it says so.
    pub(super) kind: String,
    /// Its name, as far as it has one.
    pub(super) object: String,
    /// What is wrong with it.
    pub(super) error: String,
}

/// The first document of a stream of JSON, and what follows it; `None` where its end can't be told.
pub(super) fn first_document(text: &str) -> Option<(&str, &str)> {
    let mut documents = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    let first = documents.next()?.ok()?;
    Some((first.get(), text.get(documents.byte_offset()..)?))
}

/// A list in JSON.
pub(super) fn json(document: &str) -> Option<List> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Items<'a> {
        #[serde(default)]
        kind: String,
        #[serde(default)]
        api_version: String,
        #[serde(borrow)]
        items: Vec<&'a RawValue>,
    }
    let list: Items = serde_json::from_str(document).ok()?;
    let decoded = |item: &&RawValue| {
        serde_json::from_str(item.get()).map_err(|error| broken(item.get(), &error))
    };
    Some(List {
        items: list.items.iter().map(decoded).collect(),
        kind: list.kind,
        version: list.api_version,
    })
}

/// A list in YAML.
pub(super) fn yaml(document: &str) -> Option<List> {
    let list: Value = super::yaml(document).ok()?;
    json(&list.to_string())
}

fn broken(item: &str, error: &serde_json::Error) -> Broken {
    let value: Option<Value> = serde_json::from_str(item).ok();
    let kind = value
        .as_ref()
        .and_then(|value| value.get("kind")?.as_str())
        .map_or_else(|| "item".to_owned(), cut);
    Broken {
        kind,
        object: name_in(item),
        error: error.to_string(),
    }
}
