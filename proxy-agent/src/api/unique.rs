//! Values without duplicate keys: of two settings under one name nobody can say which was meant.

use std::{collections::HashMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

/// Reads any value, or nothing where there is `null`.
pub(super) fn value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    let value = Option::<Unique>::deserialize(deserializer)?;
    Ok(value.map(|Unique(value)| value))
}

/// Reads names and texts; `null` is as good as none.
pub(super) fn texts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<HashMap<String, String>, D::Error> {
    let texts = Option::<Texts>::deserialize(deserializer)?;
    Ok(texts.map(|Texts(texts)| texts).unwrap_or_default())
}

/// Reads names that Penstock knows with their texts. Others' may be large, and are not kept.
pub(super) fn known_texts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<HashMap<String, String>, D::Error> {
    struct Known;

    impl<'de> Visitor<'de> for Known {
        type Value = HashMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("names and texts")
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(HashMap::new())
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(HashMap::new())
        }

        fn visit_some<D: Deserializer<'de>>(
            self,
            deserializer: D,
        ) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_map(self)
        }

        fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
            let mut texts = HashMap::new();
            while let Some(key) = access.next_key::<String>()? {
                if !key.starts_with(super::OWN_PREFIX) && key != super::TRIGGERED {
                    access.next_value::<IgnoredAny>()?;
                    continue;
                }
                if texts.contains_key(&key) {
                    return Err(twice(&key));
                }
                texts.insert(key, access.next_value()?);
            }
            Ok(texts)
        }
    }

    deserializer.deserialize_option(Known)
}

fn twice<E: Error>(key: &str) -> E {
    E::custom(format_args!("{:?} is there twice", super::cut(key)))
}

struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Self)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Unique::deserialize(deserializer).map(|Unique(value)| value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = access.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if values.contains_key(&key) {
                return Err(twice(&key));
            }
            let Unique(value) = access.next_value()?;
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}

struct Texts(HashMap<String, String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(AnyTexts).map(Self)
    }
}

struct AnyTexts;

impl<'de> Visitor<'de> for AnyTexts {
    type Value = HashMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("names and texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut texts = HashMap::new();
        while let Some(key) = access.next_key::<String>()? {
            if texts.contains_key(&key) {
                return Err(twice(&key));
            }
            texts.insert(key, access.next_value()?);
        }
        Ok(texts)
    }
}
