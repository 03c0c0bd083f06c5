//! A new host gets its certificate: the CA's machine invites it with a ticket, the host makes its key and asks. No
//! key ever travels, and the ticket is good once.
//!
//! ```text
//! vmferry certs invite bravo                       vmferry join TICKET
//!   listens, prints the ticket ── by your hands ──►  makes its key
//!                              ◄── TLS 1.3 ───────   is that the CA of the ticket?
//!   proof of the secret? ◄──── request, proof ────
//!   key, name? signs ───────── certificates, proof ─► proof of the secret? do they fit? writes them
//!   done ◄──────────────────── stored ────────────
//! ```
//! A proof is an HMAC with the ticket's secret over this connection's exported keying material (RFC 8446 §7.5) and
//! what is said. So the secret is never sent, and somebody between the two, with whatever certificate, can neither
//! use what he hears nor pass it on. The certificate of the connection is signed by the CA whose fingerprint is in
//! the ticket, and is no host's (`pki::enrolment`).
//!
//! The first key that comes with a proof is the only one: who asks again with it, because the answer was lost, gets
//! the same answer; every other one is refused.

mod invite;
mod join;
pub mod message;
mod ticket;
mod tls;

pub use invite::{Invitation, InviteError, Refused};
pub use join::{JoinError, Joined, join};
pub use ticket::{Ticket, TicketError};
