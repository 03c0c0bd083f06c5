//! Attacks on a real agent, from the network and from the host: each is refused, counted and logged once,
//! and the agent serves its own peers and operators meanwhile. The attacker is made of the library's network
//! side and of raw sockets. `docs/security.md` has the table.

mod audit;
mod crowd;
mod destination;
mod documents;
mod expiry;
mod flood;
mod frames;
mod grants;
mod handshake;
mod listeners;
mod memory;
mod moving;
mod names;
mod noise;
mod outside_grant;
mod parting;
mod process;
mod raw;
mod replicas;
mod roles;
mod sessions;
mod speed;
mod strangers;
mod texts;
mod trust;
mod types;
mod victim;
mod waits;
mod wear;
