//! Rejected clients.

use rustix::net::sockopt;

use super::*;
use crate::sys::socket_pair;

#[test]
fn a_unix_client_gets_the_rest_of_an_answer_that_found_no_room() {
    let answer: Arc<[u8]> = (0..=u8::MAX).cycle().take(64 << 10).collect();
    let mut bench = Bench::nowhere();
    bench.reject_policy = RejectPolicy::new(RejectResponse::File(answer.clone()), None);
    let (client, accepted) = socket_pair().unwrap();
    sockopt::set_socket_send_buffer_size(&accepted, 1).unwrap();
    let mut connection = bench.connection(accepted);
    client.send(b"hello").unwrap();
    let verdict = bench.act(|context| connection.reject(CloseCause::Rejected, context));
    assert!(matches!(verdict, Verdict::Enter(Deadline::Sniffing)), "{verdict:?}");
    bench.until(&mut connection, |it, _| !it.client.is_writable());
    let mut got = Vec::new();
    loop {
        got.extend(read(&client).unwrap());
        if got.len() == answer.len() {
            break;
        }
        bench.mark(&mut connection);
        bench.act(|context| connection.drive(context));
    }
    assert!(got == *answer, "other bytes");
}
