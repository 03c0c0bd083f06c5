//! Arguments, progress, output; talks only to the local API.

pub mod certs;
