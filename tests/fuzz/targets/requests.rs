//! What a client of an NBD server sends, on its way to that server.

use std::collections::VecDeque;

use bytes::Bytes;
use vmferry::net::nbd_requests::NbdRequests;

use super::script::pieces;

/// Longer than any header.
const HEADER_MAX: usize = 32;

/// Whatever comes, in whatever pieces, all of it is handed over but a header that is not whole, and where
/// requests begin does not depend on the pieces.
pub(crate) fn requests(data: &[u8]) {
    let at_once = handed_over(std::iter::once(data), usize::MAX);
    for (single, take) in [(false, usize::MAX), (true, usize::MAX), (false, 1 << 14)] {
        assert_eq!(handed_over(pieces(data, single), take), at_once);
    }
}

/// How many bytes were handed over. The kernel takes at least `take` of those that it could.
fn handed_over<'a>(arriving: impl Iterator<Item = &'a [u8]>, take: usize) -> usize {
    let mut requests = NbdRequests::default();
    let (mut handed, mut queue) = (0, VecDeque::new());
    for piece in arriving {
        queue.push_back(Bytes::copy_from_slice(piece));
        loop {
            let there: usize = queue.iter().map(Bytes::len).sum();
            let writable = requests.writable(&queue);
            assert!(writable <= there, "more than there is");
            let written = writable.min(take);
            if written == 0 {
                assert!(there < HEADER_MAX, "{there} bytes are kept back");
                break;
            }
            requests.written(&queue, written);
            handed += written;
            let rest: Bytes = queue.iter().flatten().copied().skip(written).collect();
            queue = VecDeque::from([rest]);
        }
    }
    handed
}
