//! A short conversation, cut at every byte in either direction, once and twice: the streams must
//! not notice.

use std::collections::BTreeMap;
use std::time::Duration;

use vmferry_mux::mux::{Code, Config, Event, Session, StreamId};

use super::pair::{BULK, Pair, URGENT, content, drain, events, take};
use super::rng::Rng;

/// What the dialer sends on each stream; the acceptor answers with the same.
const SIZES: [usize; 3] = [10, 300, 700];

/// The conversation, and where it is cut.
struct Conversation {
    pair: Pair,
    /// Bytes until the cut, for each direction.
    until_cut: [usize; 2],
    cuts: Vec<[usize; 2]>,
    ids: Vec<StreamId>,
    doomed: StreamId,
    got: BTreeMap<(usize, StreamId), Vec<u8>>,
    ended: BTreeMap<(usize, StreamId), Vec<&'static str>>,
    moved: [usize; 2],
}

impl Conversation {
    fn new(mut cuts: Vec<[usize; 2]>) -> Self {
        let mut pair = Pair::new(Config::default());
        let ids: Vec<_> = [URGENT, BULK, BULK]
            .iter()
            .zip(SIZES)
            .map(|(open, size)| {
                let id = pair.dialer.open(pair.now, *open).unwrap();
                pair.dialer.send(pair.now, id, content(id.0.into(), 0, size)).unwrap();
                pair.dialer.finish(id);
                id
            })
            .collect();
        let doomed = pair.dialer.open(pair.now, BULK).unwrap();
        let until_cut = cuts.pop().unwrap_or([usize::MAX; 2]);
        let (got, ended) = (BTreeMap::new(), BTreeMap::new());
        Self { pair, until_cut, cuts, ids, doomed, got, ended, moved: [0; 2] }
    }

    fn run(mut self) -> [usize; 2] {
        for _ in 0..40 {
            let moved = self.turn(0) | self.turn(1);
            if !moved {
                self.pair.pass(Duration::from_millis(6));
            }
        }
        self.check();
        self.moved
    }

    /// One side sends all it has, the other one reads and reacts. True if anything moved.
    fn turn(&mut self, side: usize) -> bool {
        let now = self.pair.now;
        let (until_cut, (sender, receiver)) = (self.until_cut[side], self.sides(side));
        let bytes = drain(sender, now);
        let through = bytes.len().min(until_cut);
        receiver.handle_input(now, &bytes[..through]).unwrap();
        self.until_cut[side] -= through.min(self.until_cut[side]);
        self.moved[side] += through;
        if through < bytes.len() {
            self.cut();
        }
        self.react(1 - side);
        !bytes.is_empty()
    }

    fn sides(&mut self, sender: usize) -> (&mut Session, &mut Session) {
        let Pair { dialer, acceptor, .. } = &mut self.pair;
        if sender == 0 { (dialer, acceptor) } else { (acceptor, dialer) }
    }

    fn cut(&mut self) {
        let Pair { dialer, acceptor, now } = &mut self.pair;
        dialer.handle_disconnected(*now);
        acceptor.handle_disconnected(*now);
        let (theirs, ours) = (acceptor.rx_seq(), dialer.rx_seq());
        dialer.handle_reconnected(*now, theirs).unwrap();
        acceptor.handle_reconnected(*now, ours).unwrap();
        self.until_cut = self.cuts.pop().unwrap_or([usize::MAX; 2]);
    }

    fn react(&mut self, side: usize) {
        let (now, doomed) = (self.pair.now, self.doomed);
        let (session, _) = self.sides(side);
        let mut log = Vec::new();
        let mut read = Vec::new();
        for event in events(session) {
            match event {
                Event::Opened { id, .. } if id == doomed => session.refuse(id, Code::Denied),
                Event::Opened { id, .. } => session.accept(id).unwrap(),
                Event::Readable { id } => read.push((id, take(session, now, id))),
                Event::Finished { id } => {
                    read.push((id, take(session, now, id)));
                    log.push((id, "finished"));
                }
                Event::Reset { id, code } => {
                    assert_eq!(code, Code::Denied);
                    log.push((id, "reset"));
                }
                Event::Closed { id } => log.push((id, "closed")),
                Event::Accepted { .. } | Event::Writable { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        for (id, bytes) in read {
            self.got.entry((side, id)).or_default().extend(bytes);
        }
        for (id, what) in log {
            self.ended.entry((side, id)).or_default().push(what);
            if side == 1 && what == "finished" {
                let answer = self.got[&(side, id)].clone();
                self.pair.acceptor.send(now, id, answer.into()).unwrap();
                self.pair.acceptor.finish(id);
            }
        }
    }

    fn check(&self) {
        for (id, size) in self.ids.iter().zip(SIZES) {
            for side in 0..2 {
                assert_eq!(
                    self.got[&(side, *id)],
                    content(id.0.into(), 0, size),
                    "stream {} side {side}",
                    id.0
                );
                assert_eq!(self.ended[&(side, *id)], ["finished", "closed"], "stream {} side {side}", id.0);
            }
        }
        assert_eq!(self.ended[&(0, self.doomed)], ["reset", "closed"]);
        assert_eq!(self.ended[&(1, self.doomed)], ["closed"]);
        self.pair.assert_empty();
    }
}

#[test]
fn a_cut_at_any_byte_loses_nothing() {
    let whole = Conversation::new(Vec::new()).run();
    assert!(whole.iter().all(|bytes| (1000..4000).contains(bytes)), "{whole:?}");
    for (side, bytes) in whole.into_iter().enumerate() {
        for offset in 0..bytes {
            let mut cut = [usize::MAX; 2];
            cut[side] = offset;
            println!("cut {cut:?}");
            Conversation::new(vec![cut]).run();
        }
    }
}

#[test]
fn cuts_during_the_replay_lose_nothing() {
    let mut rng = Rng::new(super::rng::number_from_env("VMFERRY_SEED").unwrap_or(7));
    for _ in 0..2000 {
        let cuts: Vec<_> = (0..rng.range(2, 5)).map(|_| [rng.below(1500), rng.below(1500)]).collect();
        println!("cuts, the last one first: {cuts:?}");
        Conversation::new(cuts).run();
    }
}

#[test]
fn an_impossible_resume_is_refused() {
    let mut pair = Pair::new(Config::default());
    let id = pair.open(BULK);
    pair.dialer.send(pair.now, id, content(1, 0, 5000)).unwrap();
    pair.settle();
    let acked = pair.acceptor.rx_seq();
    for wrong in [0, acked - 1, acked + 1, u64::MAX] {
        let mut pair = Pair::new(Config::default());
        let id = pair.open(BULK);
        pair.dialer.send(pair.now, id, content(1, 0, 5000)).unwrap();
        pair.settle();
        pair.dialer.handle_disconnected(pair.now);
        let refused = pair.dialer.handle_reconnected(pair.now, wrong).unwrap_err();
        assert_eq!(refused.code(), Code::Continuity, "resumed at {wrong} of {acked}");
        assert!(pair.dialer.handle_input(pair.now, &[0]).is_err(), "the session goes on after {wrong}");
    }
}
