//! What a new host is told: whom to ask, whom to believe, and the secret. Knows no connection.

use std::fmt;
use std::str::FromStr;

use time::OffsetDateTime;

use crate::net::identity::Identity;
use crate::printable::printable;

/// The first word of a ticket: its format.
const FORMAT: &str = "vmferry1";
/// Longest ticket; a name and an address are the only parts without a fixed length.
const BYTES_MAX: usize = 1024;

/// A ticket. As text: `vmferry1/NAME/ADDRESS/EXPIRY/CA/SECRET/CHECK`, so that a person sees what it is for.
#[derive(Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The host that may join.
    pub name: Identity,
    /// Where the CA's machine listens, `host:port`.
    pub address: String,
    pub expires: OffsetDateTime,
    /// SHA-256 of the CA's certificate.
    pub ca: [u8; 32],
    pub secret: [u8; 32],
}

/// Why a text is no ticket.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    #[error("that is no ticket: it begins with {FORMAT}/ and is printed by `vmferry certs invite`")]
    NoTicket,
    #[error("the ticket is mistyped or cut off; copy all of it")]
    Damaged,
}

impl fmt::Debug for Ticket {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("name", &self.name)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, address, expires) = (&self.name, &self.address, self.expires.unix_timestamp());
        let said = format!("{FORMAT}/{name}/{address}/{expires}/{}/{}", hex(&self.ca), hex(&self.secret));
        write!(f, "{said}/{:08x}", crc32fast::hash(said.as_bytes()))
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        if text.len() > BYTES_MAX || !text.starts_with(&format!("{FORMAT}/")) {
            return Err(TicketError::NoTicket);
        }
        let (said, check) = text.rsplit_once('/').ok_or(TicketError::Damaged)?;
        if check != format!("{:08x}", crc32fast::hash(said.as_bytes())) {
            return Err(TicketError::Damaged);
        }
        let parts: Vec<&str> = said.split('/').collect();
        let [_, name, address, expires, ca, secret] = parts[..] else { return Err(TicketError::Damaged) };
        if printable(address) != address {
            return Err(TicketError::Damaged);
        }
        let expires = expires.parse().ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        Ok(Self {
            name: name.parse().map_err(|_| TicketError::Damaged)?,
            address: address.to_owned(),
            expires: expires.ok_or(TicketError::Damaged)?,
            ca: from_hex(ca).ok_or(TicketError::Damaged)?,
            secret: from_hex(secret).ok_or(TicketError::Damaged)?,
        })
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    bytes_of(text)?.try_into().ok()
}

/// The bytes of a text in hexadecimal.
pub(super) fn bytes_of(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            name: "bravo.rack".parse().unwrap(),
            address: "[fd77::1]:9909".into(),
            expires: OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap(),
            ca: [0xab; 32],
            secret: [0x07; 32],
        }
    }

    #[test]
    fn what_is_printed_is_read_again_and_nothing_else() {
        let text = ticket().to_string();
        assert_eq!(format!(" {text}\n").parse(), Ok(ticket()));
        assert!(!format!("{:?}", ticket()).contains("07"));
        for at in 0..text.len() {
            assert!(text[..at].parse::<Ticket>().is_err(), "{at} bytes of it");
            let mut other = text.clone().into_bytes();
            other[at] ^= 1;
            assert!(String::from_utf8(other).unwrap().parse::<Ticket>().is_err(), "another byte {at}");
        }
        for bad in ["", "vmferry1", "vmferry2/x", "vmferry1//", &"vmferry1/".repeat(1000)] {
            assert!(bad.parse::<Ticket>().is_err(), "{bad}");
        }
    }
}
