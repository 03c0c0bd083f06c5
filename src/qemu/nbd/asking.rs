//! The far half of a handshake that is led for QEMU's client: what is agreed on with the server, without its
//! socket. What the server sends goes in, and the terms come out.
//!
//! Everything is asked at once and before the server's greeting, so that it takes one turn of the link and not
//! six: QEMU's server gives a client 10 s, and behind a long queue six turns last longer. That the server speaks
//! fixed newstyle is looked at afterwards.
//!
//! ```text
//! to the server     flags | STRUCTURED_REPLY | EXTENDED_HEADERS, if QEMU asks for it | SET_META_CONTEXT | GO
//! from the server   greeting | the replies to each, in this order
//! ```

use bytes::{Buf, BytesMut};

use super::writing::{GREETING_LEN, OPTION_REPLY_LEN, is_newstyle};
use super::{
    BASE_ALLOCATION, EXPORT_NAME_BYTES_MAX, HANDSHAKE_FLAGS, INFO_BLOCK_SIZE, NbdError, OPT_EXTENDED_HEADERS,
    OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_REPLY_MAGIC, REP_ACK, REP_ERROR_BIT, REP_INFO,
    REP_META_CONTEXT, be_u32, be_u64, export_info, named, option, set_meta_context,
};
use crate::printable::bounded;

/// All that a server says in a handshake. QEMU's takes less than 200 bytes.
const SAID_BYTES_MAX: usize = 64 << 10;
/// Of a description of block sizes: its kind, and three numbers.
const BLOCK_SIZE_LEN: usize = 14;
/// Of an export's flags: the others mean something.
const HAS_FLAGS: u16 = 1;
/// The smallest block is no larger.
const MIN_BLOCK_MAX: u32 = 64 << 10;

/// How requests and replies look from the end of a handshake on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Replies {
    Simple,
    Structured,
    /// Structured, and lengths of 64 bits.
    Extended,
}

/// What was agreed on with a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    pub size: u64,
    /// What the export can do.
    pub flags: u16,
    /// Smallest, preferred and largest block, as the server has said it.
    pub block_sizes: Option<[u8; 12]>,
    pub replies: Replies,
    /// The number under which the server tells what is allocated, if it does.
    pub base_allocation: Option<u32>,
}

impl Terms {
    /// Whether they mean what the protocol says. QEMU's client aborts its process where some of them do not.
    fn judge(&self) -> Result<(), NbdError> {
        let refuse = |is_wrong: bool, what| if is_wrong { Err(NbdError::Protocol(what)) } else { Ok(()) };
        refuse(self.flags & HAS_FLAGS == 0, "an export without flags")?;
        let Some(sizes) = &self.block_sizes else { return Ok(()) };
        let [min, preferred, max] = [0, 4, 8].map(|at| be_u32(&sizes[at..]));
        let is_min = min.is_power_of_two() && min <= MIN_BLOCK_MAX;
        refuse(!is_min, "a smallest block that is no power of two, or larger than 64 KiB")?;
        let is_preferred = preferred.is_power_of_two() && preferred >= min;
        refuse(!is_preferred, "a preferred block that is no power of two, or less than the smallest")?;
        refuse(max < min, "a largest block that is less than the smallest")?;
        let is_whole = self.size.is_multiple_of(u64::from(min));
        refuse(!is_whole, "an export whose size is no multiple of its smallest block")
    }
}

/// One handshake with a server.
#[derive(Debug)]
pub struct Asking {
    /// None: before the greeting.
    option: Option<u32>,
    extended: bool,
    has_export: bool,
    terms: Terms,
    received: BytesMut,
    said: usize,
}

impl Asking {
    /// Before the first byte; `extended`: the client will ask for extended headers.
    pub fn new(extended: bool) -> Self {
        let terms =
            Terms { size: 0, flags: 0, block_sizes: None, replies: Replies::Simple, base_allocation: None };
        Self { option: None, extended, has_export: false, terms, received: BytesMut::new(), said: 0 }
    }

    /// All that the server is sent.
    ///
    /// Errors: [`NbdError::Name`].
    pub fn questions(&self, export: &str) -> Result<Vec<u8>, NbdError> {
        if export.len() > EXPORT_NAME_BYTES_MAX {
            // Its length is all that is said of it.
            return Err(NbdError::Name(export.len()));
        }
        let mut all = u32::from(HANDSHAKE_FLAGS).to_be_bytes().to_vec();
        all.extend(option(OPT_STRUCTURED_REPLY, &[])?);
        if self.extended {
            all.extend(option(OPT_EXTENDED_HEADERS, &[])?);
        }
        all.extend(option(OPT_SET_META_CONTEXT, &set_meta_context(export, BASE_ALLOCATION)?)?);
        let asks_for = [1_u16.to_be_bytes(), INFO_BLOCK_SIZE.to_be_bytes()].concat();
        all.extend(option(OPT_GO, &[named(export)?, asks_for].concat())?);
        Ok(all)
    }

    /// Takes what the server has sent. The terms, once they are agreed on.
    ///
    /// Errors: any [`NbdError`]; nothing more is to be given to it.
    pub fn take(&mut self, received: &[u8]) -> Result<Option<Terms>, NbdError> {
        self.said = self.said.saturating_add(received.len());
        if self.said > SAID_BYTES_MAX {
            return Err(NbdError::Protocol("a handshake that is too long"));
        }
        self.received.extend_from_slice(received);
        loop {
            let Some(asked) = self.option else {
                let Some(greeting) = self.received.get(..GREETING_LEN) else { return Ok(None) };
                is_newstyle(greeting)?;
                self.received.advance(GREETING_LEN);
                self.option = Some(OPT_STRUCTURED_REPLY);
                continue;
            };
            let Some((kind, data)) = self.reply(asked)? else { return Ok(None) };
            if self.answered(asked, kind, &data)? {
                // It has nothing to say before it is asked for something.
                let is_silent = self.received.is_empty();
                return if is_silent {
                    self.terms.judge().map(|()| Some(self.terms.clone()))
                } else {
                    Err(NbdError::Protocol("more than a handshake"))
                };
            }
        }
    }

    /// The next whole reply to an option.
    fn reply(&mut self, asked: u32) -> Result<Option<(u32, BytesMut)>, NbdError> {
        let Some(head) = self.received.get(..OPTION_REPLY_LEN) else { return Ok(None) };
        if be_u64(head) != OPTION_REPLY_MAGIC {
            return Err(NbdError::Protocol("no reply to an option"));
        }
        if be_u32(&head[8..]) != asked {
            return Err(NbdError::Protocol("a reply to another option"));
        }
        let (kind, length) = (be_u32(&head[12..]), be_u32(&head[16..]) as usize);
        if length > SAID_BYTES_MAX {
            return Err(NbdError::Protocol("a reply that is too long"));
        }
        if self.received.len() < OPTION_REPLY_LEN + length {
            return Ok(None);
        }
        self.received.advance(OPTION_REPLY_LEN);
        Ok(Some((kind, self.received.split_to(length))))
    }

    /// Learns from a reply. True after the last.
    fn answered(&mut self, asked: u32, kind: u32, data: &[u8]) -> Result<bool, NbdError> {
        let refused = kind & REP_ERROR_BIT != 0;
        match (asked, kind) {
            (OPT_STRUCTURED_REPLY, REP_ACK) => self.terms.replies = Replies::Structured,
            (OPT_EXTENDED_HEADERS, REP_ACK) => self.terms.replies = Replies::Extended,
            (OPT_SET_META_CONTEXT, REP_META_CONTEXT) => self.learn_context(data)?,
            (OPT_GO, REP_INFO) => self.learn_export(data)?,
            (OPT_SET_META_CONTEXT, REP_ACK) => {}
            (OPT_GO, REP_ACK) if self.has_export => return Ok(true),
            (OPT_GO, REP_ACK) => return Err(NbdError::Protocol("no description of the export")),
            // It can be done without; without an export the last answer says so.
            (OPT_SET_META_CONTEXT, _) if refused => self.terms.base_allocation = None,
            (OPT_EXTENDED_HEADERS, _) if refused => {}
            _ if refused => {
                let what = if asked == OPT_GO { "the export" } else { "structured replies" };
                return Err(NbdError::Handshake { what, text: bounded(&String::from_utf8_lossy(data)) });
            }
            _ => return Err(NbdError::Protocol("a reply that does not fit its option")),
        }
        if kind == REP_ACK || refused {
            self.option = Some(match asked {
                OPT_STRUCTURED_REPLY if self.extended => OPT_EXTENDED_HEADERS,
                OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS => OPT_SET_META_CONTEXT,
                _ => OPT_GO,
            });
        }
        Ok(false)
    }

    fn learn_context(&mut self, data: &[u8]) -> Result<(), NbdError> {
        if data.get(4..) != Some(BASE_ALLOCATION.as_bytes()) || self.terms.base_allocation.is_some() {
            return Err(NbdError::Protocol("a context that was not asked for"));
        }
        self.terms.base_allocation = Some(be_u32(data));
        Ok(())
    }

    fn learn_export(&mut self, info: &[u8]) -> Result<(), NbdError> {
        if let Some((size, flags)) = export_info(REP_INFO, info)? {
            (self.terms.size, self.terms.flags, self.has_export) = (size, flags, true);
        } else if info.starts_with(&INFO_BLOCK_SIZE.to_be_bytes()) {
            let sizes = info.get(2..BLOCK_SIZE_LEN).and_then(|sizes| sizes.try_into().ok());
            if sizes.is_none() || info.len() != BLOCK_SIZE_LEN {
                return Err(NbdError::Protocol("a description of block sizes of another length"));
            }
            self.terms.block_sizes = sizes;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
    const ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;
    const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
    const SIZES: [u8; 12] = [0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0];

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let numbers = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &numbers, data].concat()
    }

    fn info(size: u64, flags: u16) -> Vec<u8> {
        [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    /// What QEMU's server says to what is asked at once: with extended headers, or one that does not know them.
    fn qemu(extended: Option<bool>) -> Vec<u8> {
        let extended = extended.map(|knows| {
            let text: &[u8] = if knows { b"" } else { b"Unsupported option 11 (unknown)" };
            reply(OPT_EXTENDED_HEADERS, if knows { REP_ACK } else { ERR_UNSUP }, text)
        });
        [
            GREETING,
            &reply(OPT_STRUCTURED_REPLY, REP_ACK, b""),
            &extended.unwrap_or_default(),
            &reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x07base:allocation"),
            &reply(OPT_SET_META_CONTEXT, REP_ACK, b""),
            &reply(OPT_GO, REP_INFO, &info(1 << 40, 0x5ed)),
            &reply(OPT_GO, REP_INFO, &[&[0, 3][..], &SIZES].concat()),
            // Nobody knows what this is.
            &reply(OPT_GO, REP_INFO, b"\x01\x00whatever"),
            &reply(OPT_GO, REP_ACK, b""),
        ]
        .concat()
    }

    fn terms(replies: Replies) -> Terms {
        let (size, flags) = (1 << 40, 0x5ed);
        Terms { size, flags, block_sizes: Some(SIZES), replies, base_allocation: Some(7) }
    }

    #[test]
    fn what_a_server_grants_is_learnt_in_any_pieces() {
        for (asks, knows, replies) in [
            (true, Some(true), Replies::Extended),
            (true, Some(false), Replies::Structured),
            (false, None, Replies::Structured),
        ] {
            let said = qemu(knows);
            for piece in [1, 7, said.len()] {
                let mut asking = Asking::new(asks);
                let mut agreed = Vec::new();
                said.chunks(piece).for_each(|piece| agreed.extend(asking.take(piece).unwrap()));
                assert_eq!(agreed, [terms(replies)], "{asks} {piece}");
            }
        }
    }

    #[test]
    fn all_is_asked_at_once() {
        let questions = Asking::new(true).questions("vda").unwrap();
        let wanted = [
            &b"\0\0\0\x03"[..],
            b"IHAVEOPT\0\0\0\x08\0\0\0\0",
            b"IHAVEOPT\0\0\0\x0b\0\0\0\0",
            b"IHAVEOPT\0\0\0\x0a\0\0\0\x1e\0\0\0\x03vda\0\0\0\x01\0\0\0\x0fbase:allocation",
            b"IHAVEOPT\0\0\0\x07\0\0\0\x0b\0\0\0\x03vda\0\x01\0\x03",
        ];
        assert_eq!(questions, wanted.concat());
        assert!(Asking::new(false).questions("vda").unwrap().len() == questions.len() - 16);
    }

    #[test]
    fn a_refusal_is_passed_on_and_what_is_optional_is_done_without() {
        let begin = [GREETING, &reply(OPT_STRUCTURED_REPLY, REP_ACK, b"")].concat();
        let absent = [
            &begin[..],
            &reply(OPT_SET_META_CONTEXT, ERR_UNKNOWN, b"export 'vda' not present"),
            &reply(OPT_GO, ERR_UNKNOWN, b"export 'vda' not present"),
        ];
        let error = Asking::new(false).take(&absent.concat()).unwrap_err();
        assert!(error.to_string().contains("export 'vda' not present"), "{error}");
        let plain = [
            &begin[..],
            &reply(OPT_SET_META_CONTEXT, ERR_UNSUP, b"no"),
            &reply(OPT_GO, REP_INFO, &info(5, 1)),
            &reply(OPT_GO, REP_ACK, b""),
        ];
        let agreed = Asking::new(false).take(&plain.concat()).unwrap().unwrap();
        assert_eq!((agreed.size, agreed.base_allocation, agreed.block_sizes), (5, None, None));
        let taken_back = [
            &begin[..],
            &reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x07base:allocation"),
            &reply(OPT_SET_META_CONTEXT, ERR_UNKNOWN, b"no"),
            &reply(OPT_GO, REP_INFO, &info(5, 1)),
            &reply(OPT_GO, REP_ACK, b""),
        ];
        let agreed = Asking::new(false).take(&taken_back.concat()).unwrap().unwrap();
        assert_eq!(agreed.base_allocation, None, "a context that was refused after all");
        let old = [GREETING, &reply(OPT_STRUCTURED_REPLY, ERR_UNSUP, b"what?")].concat();
        let error = Asking::new(false).take(&old).unwrap_err();
        assert!(error.to_string().contains("structured replies: what?"), "{error}");
    }

    /// What is agreed on with a server that describes its export so.
    fn described(size: u64, flags: u16, sizes: Option<[u32; 3]>) -> Result<Option<Terms>, NbdError> {
        let sizes = sizes.map(|sizes| {
            let sizes = sizes.map(u32::to_be_bytes).concat();
            reply(OPT_GO, REP_INFO, &[&[0, 3][..], &sizes].concat())
        });
        let said = [
            GREETING,
            &reply(OPT_STRUCTURED_REPLY, REP_ACK, b""),
            &reply(OPT_SET_META_CONTEXT, REP_ACK, b""),
            // In either order.
            &reply(OPT_GO, REP_INFO, &info(size, flags)),
            &sizes.unwrap_or_default(),
            &reply(OPT_GO, REP_ACK, b""),
        ];
        Asking::new(false).take(&said.concat())
    }

    #[test]
    fn terms_that_a_client_could_not_work_with_are_refused() {
        const MIB: u64 = 1 << 20;
        for (size, flags, sizes) in [
            (MIB + 1, 1, None),
            (MIB + 512, 0x5ed, Some([512, 4096, 32 << 20])),
            (0, 1, Some([1, 4096, u32::MAX])),
            (MIB, 1, Some([64 << 10, 64 << 10, 64 << 10])),
        ] {
            let agreed = described(size, flags, sizes).unwrap().unwrap();
            assert_eq!((agreed.size, agreed.flags), (size, flags), "{sizes:?}");
        }
        for (size, flags, sizes, why) in [
            (MIB, 0, None, "without flags"),
            (MIB, 0x5ec, Some([512, 4096, 32 << 20]), "without flags"),
            (MIB, 1, Some([0, 4096, 32 << 20]), "a smallest block"),
            (MIB, 1, Some([3, 4096, 32 << 20]), "a smallest block"),
            (MIB, 1, Some([128 << 10, 128 << 10, 32 << 20]), "a smallest block"),
            (MIB, 1, Some([512, 0, 32 << 20]), "a preferred block"),
            (MIB, 1, Some([512, 4097, 32 << 20]), "a preferred block"),
            (MIB, 1, Some([4096, 512, 32 << 20]), "a preferred block"),
            (MIB, 1, Some([4096, 4096, 4095]), "a largest block"),
            (MIB + 512, 1, Some([4096, 4096, 32 << 20]), "no multiple of its smallest block"),
            (u64::MAX, 1, Some([2, 4096, 32 << 20]), "no multiple of its smallest block"),
        ] {
            let error = described(size, flags, sizes).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn an_export_has_no_longer_name_than_the_protocol_knows() {
        let asking = Asking::new(true);
        assert!(asking.questions(&"n".repeat(EXPORT_NAME_BYTES_MAX)).is_ok());
        let error = asking.questions(&"n".repeat(EXPORT_NAME_BYTES_MAX + 1)).unwrap_err();
        assert!(matches!(error, NbdError::Name(4097)) && !error.may_pass(), "{error}");
    }

    #[test]
    fn a_hostile_server_gets_an_error() {
        let begin = [GREETING, &reply(OPT_STRUCTURED_REPLY, REP_ACK, b"")].concat();
        let meta = [&begin[..], &reply(OPT_SET_META_CONTEXT, REP_ACK, b"")].concat();
        let mut long = reply(OPT_GO, REP_INFO, b"");
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        let without_end = reply(OPT_GO, REP_INFO, &[9; 1000]).repeat(100);
        let context = reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x07base:allocation");
        for (said, why) in [
            (b"NBDMAGICIHAVEOPT\0\x02".to_vec(), "no fixed newstyle"),
            (b"SSH-2.0-OpenSSH_9.2p1".to_vec(), "no newstyle greeting"),
            ([GREETING, &reply(OPT_GO, REP_ACK, b"")].concat(), "another option"),
            ([GREETING, &reply(OPT_STRUCTURED_REPLY, REP_INFO, b"")].concat(), "does not fit"),
            ([GREETING, &[0; 20]].concat(), "no reply to an option"),
            ([&begin[..], &context, &context].concat(), "not asked for"),
            ([&begin[..], &reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0")].concat(), "not asked for"),
            ([&meta[..], &reply(OPT_GO, REP_ACK, b"")].concat(), "no description"),
            ([&meta[..], &reply(OPT_GO, REP_INFO, b"\0\0\0")].concat(), "short export description"),
            ([&meta[..], &reply(OPT_GO, REP_INFO, b"\0\x03\0")].concat(), "of another length"),
            ([&meta[..], &long].concat(), "too long"),
            ([&meta[..], &without_end].concat(), "too long"),
            ([&qemu(None)[..], b"x"].concat(), "more than a handshake"),
        ] {
            let error = Asking::new(false).take(&said).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }
}
