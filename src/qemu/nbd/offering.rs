//! The near half of a handshake that is led for QEMU's client: it is offered, over a local socket, just what was
//! agreed on with the far server, so that from there on the bytes of the one fit the other.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::asking::{Replies, Terms};
use super::{
    BASE_ALLOCATION, HANDSHAKE_FLAGS, INFO_BLOCK_SIZE, INFO_EXPORT, INIT_MAGIC, NbdError,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR_BIT, REP_INFO, REP_META_CONTEXT, be_u32, length, named,
};

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
const ERR_INVALID: u32 = REP_ERROR_BIT | 3;
const ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;

/// Longest option: an export's name and a context's, of 4 KiB each at most.
const OPTION_BYTES_MAX: usize = 16 << 10;
/// QEMU's client has three or four.
const OPTIONS_MAX: usize = 32;

impl Terms {
    /// Offers an export on these terms to the client at the other end of `socket`. The socket, once the client has
    /// taken it: nothing of what comes then has been read.
    ///
    /// Errors: an I/O error when the client has gone; it knows why. Else it did not ask for what was agreed on.
    pub async fn offer(self, export: &str, socket: OwnedFd) -> Result<OwnedFd, NbdError> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        let mut socket = UnixStream::from_std(socket)?;
        let mut offer = Offer { terms: self, export, asked: Replies::Simple };
        socket.write_all(&greeting()).await?;
        if socket.read_u32().await? & 1 == 0 {
            return Err(NbdError::Client("does not speak fixed newstyle"));
        }
        for _ in 0..OPTIONS_MAX {
            if socket.read_u64().await? != OPTION_MAGIC {
                return Err(NbdError::Client("sent no option"));
            }
            let number = socket.read_u32().await?;
            let length = socket.read_u32().await? as usize;
            if length > OPTION_BYTES_MAX {
                return Err(NbdError::Client("sent an option that is too long"));
            }
            let mut data = vec![0; length];
            socket.read_exact(&mut data).await?;
            let (replies, taken) = offer.answer(number, &data)?;
            socket.write_all(&replies).await?;
            if taken {
                return Ok(socket.into_std()?.into());
            }
        }
        Err(NbdError::Client("does not end its handshake"))
    }
}

fn greeting() -> Vec<u8> {
    [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &HANDSHAKE_FLAGS.to_be_bytes()].concat()
}

/// What one client is offered.
struct Offer<'a> {
    terms: Terms,
    export: &'a str,
    asked: Replies,
}

impl Offer<'_> {
    /// The replies to an option, and whether the client has taken the export.
    fn answer(&mut self, option: u32, data: &[u8]) -> Result<(Vec<u8>, bool), NbdError> {
        let is_taken = option == OPT_GO && self.is_of_export(data);
        let replies = match option {
            OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS => self.replies_asked(option)?,
            OPT_SET_META_CONTEXT if self.asked == Replies::Simple => {
                reply(option, ERR_INVALID, b"structured replies come first")?
            }
            OPT_SET_META_CONTEXT | OPT_INFO | OPT_GO if !self.is_of_export(data) => {
                reply(option, ERR_UNKNOWN, b"there is another export here")?
            }
            OPT_SET_META_CONTEXT => self.contexts(data)?,
            OPT_GO if self.asked != self.terms.replies => {
                return Err(NbdError::Client("did not ask for the headers that were agreed on for it"));
            }
            OPT_INFO | OPT_GO => self.description(option)?,
            // To this one there is no error.
            OPT_EXPORT_NAME => return Err(NbdError::Client("does not know the option GO")),
            OPT_ABORT => return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
            _ => reply(option, ERR_UNSUP, b"")?,
        };
        Ok((replies, is_taken))
    }

    fn replies_asked(&mut self, option: u32) -> Result<Vec<u8>, NbdError> {
        let wanted = if option == OPT_EXTENDED_HEADERS { Replies::Extended } else { Replies::Structured };
        if wanted > self.terms.replies {
            return reply(option, ERR_UNSUP, b"");
        }
        self.asked = self.asked.max(wanted);
        reply(option, REP_ACK, b"")
    }

    /// Whether an option's data begins with the export's name.
    fn is_of_export(&self, data: &[u8]) -> bool {
        named(self.export).is_ok_and(|name| data.starts_with(&name))
    }

    fn contexts(&self, data: &[u8]) -> Result<Vec<u8>, NbdError> {
        let mut replies = Vec::new();
        // After the export's name, and how many there are: each with its length.
        let mut rest = data.get(self.export.len() + 8..).unwrap_or_default();
        while let Some((head, more)) = rest.split_first_chunk::<4>() {
            let Some((query, more)) = more.split_at_checked(be_u32(head) as usize) else { break };
            if let Some(id) = self.terms.base_allocation
                && query == BASE_ALLOCATION.as_bytes()
                && replies.is_empty()
            {
                let context = [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
                replies = reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context)?;
            }
            rest = more;
        }
        replies.extend(reply(OPT_SET_META_CONTEXT, REP_ACK, b"")?);
        Ok(replies)
    }

    fn description(&self, option: u32) -> Result<Vec<u8>, NbdError> {
        let Terms { size, flags, block_sizes, .. } = &self.terms;
        let mut replies = Vec::new();
        // First, as QEMU's server has it: by what it knows then its client judges the size, and it aborts later where
        // the two do not fit.
        if let Some(sizes) = block_sizes {
            replies.extend(reply(option, REP_INFO, &[&INFO_BLOCK_SIZE.to_be_bytes()[..], sizes].concat())?);
        }
        let export = [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        replies.extend(reply(option, REP_INFO, &export)?);
        replies.extend(reply(option, REP_ACK, b"")?);
        Ok(replies)
    }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Result<Vec<u8>, NbdError> {
    let numbers = [option, kind, length(data)?].map(u32::to_be_bytes).concat();
    Ok([&OPTION_REPLY_MAGIC.to_be_bytes()[..], &numbers, data].concat())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as Socket;

    use super::super::asking::Asking;
    use super::super::option;
    use super::*;

    const EXPORT: &str = "vda";

    fn terms(replies: Replies) -> Terms {
        let (size, flags, sizes) = (1 << 40, 0x5ed, [0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
        Terms { size, flags, block_sizes: Some(sizes), replies, base_allocation: Some(9) }
    }

    /// Offers to a client that says this and nothing more; what it hears, and what comes of it.
    async fn offered(agreed: Terms, says: &[u8]) -> (Vec<u8>, Result<OwnedFd, NbdError>) {
        let (near, mut client) = Socket::pair().unwrap();
        client.write_all(says).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let offer = agreed.offer(EXPORT, near.into()).await;
        let mut heard = vec![0; 4096];
        client.set_nonblocking(true).unwrap();
        let length = client.read(&mut heard).unwrap();
        heard.truncate(length);
        (heard, offer)
    }

    /// Both halves together: who asks the one hears what the other was told.
    #[tokio::test]
    async fn what_was_agreed_on_is_what_is_offered() {
        for replies in [Replies::Structured, Replies::Extended] {
            let agreed = terms(replies);
            let mut asking = Asking::new(true);
            let mut says = asking.questions(EXPORT).unwrap();
            says.extend(b"a request");
            let (heard, offer) = offered(agreed.clone(), &says).await;
            assert_eq!(asking.take(&heard).unwrap(), Some(agreed));
            let mut left = Vec::new();
            let mut socket = Socket::from(offer.unwrap());
            socket.set_nonblocking(false).unwrap();
            socket.read_to_end(&mut left).unwrap();
            assert_eq!(left, b"a request", "what comes after the handshake is not read");
        }
        let without = Terms { base_allocation: None, block_sizes: None, ..terms(Replies::Structured) };
        let mut asking = Asking::new(false);
        let (heard, offer) = offered(without.clone(), &asking.questions(EXPORT).unwrap()).await;
        assert!(offer.is_ok());
        assert_eq!(asking.take(&heard).unwrap(), Some(without));
    }

    #[tokio::test]
    async fn block_sizes_are_told_before_the_size_that_is_judged_by_them() {
        let asked = Asking::new(false).questions(EXPORT).unwrap();
        let (heard, offer) = offered(terms(Replies::Structured), &asked).await;
        assert!(offer.is_ok());
        let info =
            |kind: u16| [&[0, 0, 0, 7, 0, 0, 0, 3][..], &[0, 0, 0, if kind == 0 { 12 } else { 14 }]].concat();
        let at = |kind| {
            let reply = [info(kind), kind.to_be_bytes().to_vec()].concat();
            heard.windows(reply.len()).position(|window| window == reply).unwrap()
        };
        assert!(at(INFO_BLOCK_SIZE) < at(INFO_EXPORT));
    }

    #[tokio::test]
    async fn a_client_that_wants_something_else_is_refused() {
        let flags = 3_u32.to_be_bytes().to_vec();
        let said = |options: &[Vec<u8>]| [&flags[..], &options.concat()].concat();
        let go = |name: &str| option(OPT_GO, &[named(name).unwrap(), vec![0, 0]].concat()).unwrap();
        let structured = option(OPT_STRUCTURED_REPLY, &[]).unwrap();
        let long = [&OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 7, 1, 0, 0, 0]].concat();
        let starttls = option(5, &[]).unwrap();
        for (says, replies, why) in [
            (said(&[go(EXPORT)]), Replies::Structured, "did not ask for the headers"),
            (said(&[structured.clone(), go(EXPORT)]), Replies::Extended, "did not ask for the headers"),
            (said(&[structured.clone(), go("vdb")]), Replies::Structured, "failed"),
            (said(&[option(OPT_EXPORT_NAME, b"vda").unwrap()]), Replies::Structured, "the option GO"),
            (said(&[option(OPT_ABORT, b"").unwrap()]), Replies::Structured, "failed"),
            (said(&[long]), Replies::Structured, "too long"),
            (said(&[b"GET / HTTP/1.1\r\n".to_vec()]), Replies::Structured, "no option"),
            (said(&[starttls.repeat(40)]), Replies::Structured, "does not end"),
            (vec![0; 4], Replies::Structured, "fixed newstyle"),
        ] {
            let (_, offer) = offered(terms(replies), &says).await;
            let error = offer.unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }
}
