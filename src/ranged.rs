//! Whole numbers within a range, read so that a refusal names the range.

use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};

/// Reads a whole number from `min` to `max`.
/// Errors: it is none, or outside.
pub(crate) fn number<'de, D: Deserializer<'de>>(from: D, min: u64, max: u64) -> Result<u64, D::Error> {
    from.deserialize_u64(Range { min, max })
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

/// Has a type read as a whole number within its range, from which it is made by `TryFrom`.
macro_rules! read_within {
    ($name:ident: $number:ty, $min:expr, $max:expr) => {
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let number = $crate::ranged::number(from, $min, $max)?;
                let number = <$number>::try_from(number).map_err(serde::de::Error::custom)?;
                Self::try_from(number).map_err(serde::de::Error::custom)
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
