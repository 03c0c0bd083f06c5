//! What a reader makes of a document has the document's shape.

use serde_json::Value;

/// No array was taken for an object, and no object for a name.
pub(crate) fn same_shape(given: &Value, said: &Value) {
    match (given, said) {
        (Value::Array(given), Value::Array(said)) => {
            given.iter().zip(said).for_each(|(given, said)| same_shape(given, said));
        }
        (Value::Object(given), Value::Object(said)) => {
            given.iter().for_each(|(name, given)| {
                if let Some(said) = said.get(name) {
                    same_shape(given, said);
                }
            });
        }
        (Value::Array(_) | Value::Object(_), Value::Array(_) | Value::Object(_) | Value::String(_)) => {
            panic!("{given} was read as {said}");
        }
        _ => {}
    }
}
