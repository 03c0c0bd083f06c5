//! Local sockets that programs of this host listen on or connect to.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest path of a unix socket, in bytes: `sun_path` of unix(7) without its end.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Whatever can be written by these is a socket, and means nothing but one. Of an IPv6 address the shortest form.
const ADDRESS_PATTERN: &str = r"^(127(\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3}|\[::1\]):([0-9]{1,4}|[1-5][0-9]{4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5]))))$";

fn path_pattern() -> String {
    // Of its bytes the first and the last are told apart.
    format!(r"^/([^\u0000]{{0,{}}}[^/\u0000])$", SOCKET_PATH_BYTES_MAX - 2)
}

/// A unix socket, or TCP on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(inline, extend("anyOf" = [{ "pattern": path_pattern() }, { "pattern": ADDRESS_PATTERN }]))]
pub enum LocalSocket {
    /// A unix socket's path, absolute.
    Unix(PathBuf),
    /// A loopback address.
    Tcp(SocketAddr),
}

/// Not a local socket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SocketError {
    /// Neither form.
    #[error(
        "\"{0}\" is neither an absolute path nor an address with a port, as in /run/x.sock or 127.0.0.1:5900"
    )]
    Form(String),
    /// Anybody on the network could connect.
    #[error("{0} is no loopback address; what others can reach must not leave in clear")]
    NotLoopback(SocketAddr),
    /// Too long for the kernel.
    #[error("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, {} has {}", .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
}

impl FromStr for LocalSocket {
    type Err = SocketError;

    fn from_str(text: &str) -> Result<Self, SocketError> {
        if text.starts_with('/') && !text.contains('\0') && !text.ends_with('/') {
            let path = PathBuf::from(text);
            let fits = path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX;
            return if fits { Ok(Self::Unix(path)) } else { Err(SocketError::TooLong(path)) };
        }
        let address: SocketAddr = text.parse().map_err(|_| SocketError::Form(text.to_owned()))?;
        if address.ip().is_loopback() {
            Ok(Self::Tcp(address))
        } else {
            Err(SocketError::NotLoopback(address))
        }
    }
}

impl TryFrom<String> for LocalSocket {
    type Error = SocketError;

    fn try_from(text: String) -> Result<Self, SocketError> {
        text.parse()
    }
}

impl From<LocalSocket> for String {
    fn from(socket: LocalSocket) -> Self {
        socket.to_string()
    }
}

impl fmt::Display for LocalSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl LocalSocket {
    /// A unix socket's path.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }
}
