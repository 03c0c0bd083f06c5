//! JSON that others wrote, read by stricter rules than derived code has, so that a document means one thing. Pure.
//!
//! * An object is written as an object. Derived code takes an array, too, for the fields in their order.
//! * No object has a name twice. Of two values the last would count here, and perhaps the first elsewhere.
//! * A variant without a value is its name. Derived code takes `{"name": null}`, too.
//! * A number is what it is worth: `780.0`, `7.8e2` and `780` are one (JSON Schema 2020-12, Validation §6.1.1). Derived
//!   code takes only the last for a whole number.
//!
//! What serde_json does already: nothing may follow the document, texts are UTF-8, nothing is nested deeper than 127
//! times, a number is no greater than a double.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Map, Number, Value};

/// A document in which no object has a name twice.
#[derive(Debug, Clone, PartialEq)]
pub struct Document(pub Value);

/// Reads a whole document.
pub fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
    let Document(value) = serde_json::from_slice(json)?;
    T::deserialize(Strict(value))
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Once).map(Self)
    }
}

/// Reads any value whose objects have each name once.
struct Once;

impl<'de> DeserializeSeed<'de> for Once {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Once {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, is: bool) -> Result<Value, E> {
        Ok(is.into())
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(Self)? {
            all.push(item);
        }
        Ok(all.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            if all.contains_key(&name) {
                return Err(A::Error::custom(format_args!("the name {name:?} is there twice")));
            }
            all.insert(name, fields.next_value_seed(Self)?);
        }
        Ok(all.into())
    }
}

/// A value as it is given to derived code.
#[derive(Debug)]
pub struct Strict(pub Value);

impl Strict {
    /// Its whole number, also if that is written as `780.0`.
    fn whole(self) -> Value {
        match self.0.as_f64() {
            Some(double) if self.0.is_f64() => whole(double).map_or(self.0, Value::Number),
            _ => self.0,
        }
    }
}

/// The whole number that a double is, if there is one of 64 bits.
fn whole(double: f64) -> Option<Number> {
    // Powers of two, which doubles are exactly; what is below them converts without loss.
    const U64: f64 = 18_446_744_073_709_551_616.0;
    const I64: f64 = 9_223_372_036_854_775_808.0;
    match double {
        _ if double.fract() != 0.0 => None,
        0.0..U64 => Some((double as u64).into()),
        _ if (-I64..0.0).contains(&double) => Some((double as i64).into()),
        _ => None,
    }
}

/// Has these read a number by its worth.
macro_rules! by_worth {
    ($($method:ident)*) => {
        $(
            fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
                Strict(self.whole()).deserialize_any(visitor)
            }
        )*
    };
}

impl<'de> Deserializer<'de> for Strict {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => {
                let mut left = Items(items.into_iter());
                let read = visitor.visit_seq(&mut left)?;
                match left.0.len() {
                    0 => Ok(read),
                    more => Err(Error::custom(format_args!("the array has {more} elements too many"))),
                }
            }
            Value::Object(fields) => visitor.visit_map(Fields { rest: fields.into_iter(), value: None }),
            simple => simple.deserialize_any(visitor),
        }
    }

    by_worth! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(_) => Err(Error::invalid_type(Unexpected::Seq, &"an object")),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let chosen = match self.0 {
            Value::String(name) => Chosen { name, value: None },
            Value::Object(fields) => {
                let mut fields = fields.into_iter();
                match (fields.next(), fields.next()) {
                    (Some((name, value)), None) => Chosen { name, value: Some(value) },
                    _ => return Err(Error::invalid_value(Unexpected::Map, &"an object with one name")),
                }
            }
            // In the words that it has for whatever is neither.
            other => return other.deserialize_enum("", &[], visitor),
        };
        visitor.visit_enum(chosen)
    }

    forward_to_deserialize_any! {
        bool f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct identifier ignored_any
    }
}

struct Items(std::vec::IntoIter<Value>);

impl<'de> SeqAccess<'de> for &mut Items {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        self.0.next().map(|item| seed.deserialize(Strict(item))).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

struct Fields {
    rest: serde_json::map::IntoIter,
    value: Option<Value>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        let Some((name, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(StrDeserializer::new(&name)).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let value = self.value.take().ok_or_else(|| Error::custom("a name has no value"))?;
        seed.deserialize(Strict(value))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}

/// A variant, and what it carries.
struct Chosen {
    name: String,
    value: Option<Value>,
}

impl<'de> EnumAccess<'de> for Chosen {
    type Error = Error;
    type Variant = Carried;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Carried), Error> {
        Ok((seed.deserialize(StrDeserializer::new(&self.name))?, Carried(self.value)))
    }
}

struct Carried(Option<Value>);

impl Carried {
    fn value(self, expected: &str) -> Result<Strict, Error> {
        self.0.map(Strict).ok_or_else(|| Error::invalid_type(Unexpected::UnitVariant, &expected))
    }
}

impl<'de> VariantAccess<'de> for Carried {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        match self.0 {
            None => Ok(()),
            Some(_) => Err(Error::invalid_type(Unexpected::Map, &"its name alone")),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.value("a variant with a value")?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Error> {
        self.value("a variant with an array")?.deserialize_seq(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.value("a variant with an object")?.deserialize_map(visitor)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is a failure of the test")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Pair {
        a: u8,
        #[serde(default)]
        b: Option<Box<Self>>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    enum Kind {
        Alone,
        One(Option<u8>),
        Two(i8, i8),
        Named { pair: Pair },
    }

    fn pair(json: &str) -> Option<Pair> {
        read(json.as_bytes()).ok()
    }

    fn kind(json: &str) -> Option<Kind> {
        read(json.as_bytes()).ok()
    }

    fn of(a: u8) -> Option<Pair> {
        Some(Pair { a, b: None })
    }

    #[test]
    fn a_document_means_one_thing_or_nothing() {
        let in_it = Some(Pair { a: 1, b: Some(Box::new(Pair { a: 2, b: None })) });
        let deep = |depth: usize| "{\"a\":1,\"b\":".repeat(depth) + "null" + &"}".repeat(depth);
        for (json, read) in [
            (r#"{"a":1}"#, of(1)),
            (r#"{"a":1,"b":null}"#, of(1)),
            (r#"{"a":1,"b":{"a":2}}"#, in_it),
            // An object is one.
            (r"[1,null]", None),
            (r#"{"a":1,"b":[2,null]}"#, None),
            (r"null", None),
            // Names once.
            (r#"{"a":1,"a":1}"#, None),
            (r#"{"a":1,"\u0061":1}"#, None),
            (r#"{"a":1,"b":{"a":2,"a":2}}"#, None),
            (r#"{"\u0061":1}"#, of(1)),
            (r#"{"a":1,"c":1}"#, None),
            // Numbers by their worth.
            (r#"{"a":1.0}"#, of(1)),
            (r#"{"a":0.1e1}"#, of(1)),
            (r#"{"a":2.5E2}"#, of(250)),
            (r#"{"a":-0}"#, of(0)),
            (r#"{"a":1.5}"#, None),
            (r#"{"a":256.0}"#, None),
            (r#"{"a":-1.0}"#, None),
            (r#"{"a":18446744073709551617}"#, None),
            (r#"{"a":1e400}"#, None),
            (r#"{"a":"1"}"#, None),
            (r#"{"a":null}"#, None),
            // One document, and nothing else.
            (" \t\r\n{\"a\":1} \n", of(1)),
            (r#"{"a":1}{"a":1}"#, None),
            (r#"{"a":1}x"#, None),
            ("{\"a\":1}\0", None),
            ("\u{feff}{\"a\":1}", None),
            ("", None),
            (&deep(50_000), None),
        ] {
            assert_eq!(pair(json), read, "{json}");
        }
        assert!(pair(&deep(127)).is_some() && pair(&deep(128)).is_none());
        assert!(read::<Value>(b"\"\xff\"").is_err() && read::<Value>(br#""\ud800""#).is_err());
    }

    #[test]
    fn a_variant_is_its_name_or_has_its_value() {
        for (json, read) in [
            (r#""alone""#, Some(Kind::Alone)),
            (r#"{"alone":null}"#, None),
            (r#"{"one":3.0}"#, Some(Kind::One(Some(3)))),
            (r#"{"one":null}"#, Some(Kind::One(None))),
            (r#""one""#, None),
            (r#"{"one":1,"two":[1,2]}"#, None),
            (r#"{"one":1,"one":1}"#, None),
            (r"{}", None),
            (r"0", None),
            (r#"["alone"]"#, None),
            (r#"{"two":[-1.0,2]}"#, Some(Kind::Two(-1, 2))),
            (r#"{"two":[1]}"#, None),
            (r#"{"two":[1,2,3]}"#, None),
            (r#"{"two":{"0":1,"1":2}}"#, None),
            (r#"{"named":{"pair":{"a":1}}}"#, of(1).map(|pair| Kind::Named { pair })),
            (r#"{"named":[{"a":1}]}"#, None),
            (r#"{"named":{"pair":[1,null]}}"#, None),
        ] {
            assert_eq!(kind(json), read, "{json}");
        }
    }

    #[test]
    fn whole_numbers_of_64_bits_are_all_read_and_no_others() {
        for (json, number) in [
            ("18446744073709551615", Some(u64::MAX)),
            ("1.8446744073709552e19", None),
            ("18446744073709549568.0", Some(18_446_744_073_709_549_568)),
            ("9007199254740993", Some(9_007_199_254_740_993)),
            ("1e18", Some(1_000_000_000_000_000_000)),
            ("1e-3", None),
            ("-1", None),
        ] {
            assert_eq!(read::<u64>(json.as_bytes()).ok(), number, "{json}");
        }
        assert_eq!(read::<i64>(b"-9.223372036854775808e18").ok(), Some(i64::MIN));
        assert_eq!(read::<i64>(b"-9.3e18").ok(), None);
        // What is no whole number by its type stays what it is.
        assert_eq!(read::<f64>(b"1").ok(), Some(1.0));
        assert_eq!(read::<Value>(b"[1.0,{\"x\":-0.5}]").unwrap().to_string(), "[1.0,{\"x\":-0.5}]");
        let map: BTreeMap<String, (u64, bool)> = read(br#"{"x":[2.0,true]}"#).unwrap();
        assert_eq!(map["x"], (2, true));
    }
}
