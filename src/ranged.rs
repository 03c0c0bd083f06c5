//! Whole numbers within a range, read so that a refusal names the range, and described by it.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// Reads a whole number from `min` to `max`.
/// Errors: it is none, or outside.
pub(crate) fn number<'de, D: Deserializer<'de>>(from: D, min: u64, max: u64) -> Result<u64, D::Error> {
    from.deserialize_u64(Range { min, max })
}

/// The description of such a number.
pub(crate) fn schema(min: u64, max: u64) -> Schema {
    json_schema!({ "type": "integer", "minimum": min, "maximum": max })
}

/// A whole number from `MIN` to `MAX`, where no type of its own has more to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Within<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Within<MIN, MAX> {
    /// None outside the range.
    pub fn new(number: u64) -> Option<Self> {
        (MIN..=MAX).contains(&number).then_some(Self(number))
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Within<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        number(from, MIN, MAX).map(Self)
    }
}

impl<const MIN: u64, const MAX: u64> JsonSchema for Within<MIN, MAX> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("{MIN}To{MAX}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schema(MIN, MAX)
    }
}

struct Range {
    min: u64,
    max: u64,
}

impl Visitor<'_> for Range {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.max {
            u64::MAX => write!(f, "a whole number, at least {}", self.min),
            max => write!(f, "a whole number from {} to {max}", self.min),
        }
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
        match (self.min..=self.max).contains(&number) {
            true => Ok(number),
            false => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
        }
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<u64, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
        }
    }
}

/// Has a type read as a whole number within its range, from which it is made by `TryFrom`, and described as one.
macro_rules! read_within {
    ($name:ident: $number:ty, $min:expr, $max:expr) => {
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let number = $crate::ranged::number(from, $min, $max)?;
                let number = <$number>::try_from(number).map_err(serde::de::Error::custom)?;
                Self::try_from(number).map_err(serde::de::Error::custom)
            }
        }

        impl schemars::JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                $crate::ranged::schema($min, $max)
            }
        }
    };
}

pub(crate) use read_within;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, max: u64) -> Result<u64, String> {
        let mut from = serde_json::Deserializer::from_str(text);
        number(&mut from, 1, max).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_outside_is_refused_by_the_range() {
        assert_eq!((read("1", 5), read("5", 5)), (Ok(1), Ok(5)));
        for text in ["0", "6", "-1", "1.5", "\"2\"", "99999999999999999999", "null"] {
            let error = read(text, 5).err().unwrap_or_default();
            assert!(error.contains("expected a whole number from 1 to 5"), "{text}: {error}");
        }
        assert!(read("0", u64::MAX).is_err_and(|e| e.contains("at least 1")));
    }
}
