//! QEMU's description of its own commands, as far as vmferry looks into it.

use super::plain_commands;
use serde::Deserialize;

plain_commands! {
    /// Everything this QEMU understands; a reply of some hundred kilobytes.
    QueryQmpSchema = "query-qmp-schema" -> Vec<SchemaInfo>;
}

/// One entry: a command, an event or a type. Type names are numbers without a meaning.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SchemaInfo {
    pub name: String,
    /// `command`, `object`, `enum`, `event`, ...
    pub meta_type: String,
    /// A command's type of arguments.
    pub arg_type: Option<String>,
    /// An object's or enumeration's members.
    #[serde(default)]
    pub members: Vec<SchemaMember>,
    /// An object's further members, by the value of its tag.
    #[serde(default)]
    pub variants: Vec<SchemaVariant>,
}

/// A member of an object or a word of an enumeration.
#[derive(Debug, Clone, Deserialize)]
pub struct SchemaMember {
    /// Its name; alternatives have none.
    #[serde(default)]
    pub name: String,
    /// Its type; words have none.
    #[serde(rename = "type")]
    pub type_name: Option<String>,
}

/// The members that come with one value of the tag.
#[derive(Debug, Clone, Deserialize)]
pub struct SchemaVariant {
    pub case: String,
    /// The type of the members.
    #[serde(rename = "type")]
    pub type_name: String,
}
