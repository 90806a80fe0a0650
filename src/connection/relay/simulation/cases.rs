//! Schedules of a few steps, each of which has once found a defect.

use super::*;

/// Closing the upstream's socket with bytes unread reset it, and discarded bytes that were not acknowledged.
#[test]
fn a_unix_client_that_closes_under_an_answer_is_heard_to_the_end() {
    let mut worker = Worker::new(0);
    let mut connection = [Connection::new(&Port::unix(), &Port::tcp(), 0, &worker)];
    let reader = connection[0].peers[UPSTREAM].socket.as_ref().unwrap();
    sockopt::set_socket_recv_buffer_size(reader, RECEIVE_BUFFER_BYTES).unwrap();
    connection[0].act(Step::Write { side: CLIENT, bytes: WRITE_BYTES_MAX });
    connection[0].act(Step::Write { side: UPSTREAM, bytes: WRITE_BYTES_MAX });
    connection[0].act(Step::Close { side: CLIENT });
    for _turn in 0..10 {
        worker.mark(&mut connection, Duration::ZERO);
        connection[0].drive(&mut worker);
    }
    worker.finish(&mut connection, CLIENT);
    connection[0].judge();
}

/// An upstream that never stops sending must learn that its client is gone.
#[test]
fn bytes_that_nobody_takes_keep_no_relay_alive() {
    let mut worker = Worker::new(0);
    let mut connection = [Connection::new(&Port::unix(), &Port::unix(), 0, &worker)];
    connection[0].act(Step::Close { side: CLIENT });
    worker.mark(&mut connection, DEADLINE);
    for _turn in 0..100 {
        for _write in 0..4 {
            connection[0].act(Step::Write { side: UPSTREAM, bytes: WRITE_BYTES_MAX });
        }
        worker.mark(&mut connection, Duration::ZERO);
        connection[0].idle_turns = 0;
        connection[0].drive(&mut worker);
    }
    assert!(connection[0].carried.is_none(), "it is never closed: {:?}", connection[0].next);
}

/// Accepted UNIX sockets do not inherit `SO_OOBINLINE`.
#[test]
fn an_urgent_byte_of_a_unix_client_keeps_its_place() {
    let mut worker = Worker::new(0);
    let mut connection = [Connection::new(&Port::unix(), &Port::tcp(), 0, &worker)];
    connection[0].act(Step::Write { side: CLIENT, bytes: 10 });
    connection[0].act(Step::Urgent { side: CLIENT });
    connection[0].act(Step::Write { side: CLIENT, bytes: 10 });
    worker.finish(&mut connection, CLIENT);
    connection[0].judge();
}

/// A splice stops before an urgent byte, and returns the end or the reset behind it as if the byte were not there.
#[test]
fn an_urgent_byte_at_the_end_of_a_bulk_stream_arrives() {
    for last in [Step::Shut { side: CLIENT }, Step::Reset { side: CLIENT }] {
        let mut worker = Worker::new(2);
        let mut connection = [Connection::new(&Port::tcp(), &Port::tcp(), 0, &worker)];
        for _write in 0..2 {
            connection[0].act(Step::Write { side: CLIENT, bytes: 3 * SMALL_SCRATCH_BYTES });
            worker.mark(&mut connection, DEADLINE);
            connection[0].drive(&mut worker);
        }
        connection[0].act(Step::Write { side: CLIENT, bytes: 3 * SMALL_SCRATCH_BYTES });
        worker.mark(&mut connection, DEADLINE);
        connection[0].act(Step::Urgent { side: CLIENT });
        connection[0].act(last);
        connection[0].drive(&mut worker);
        worker.finish(&mut connection, CLIENT);
        connection[0].judge();
        assert!(worker.buffers.pipes.alive.get() > 0, "it is spliced");
        assert_eq!(connection[0].peers[UPSTREAM].received, 9 * SMALL_SCRATCH_BYTES + 1);
    }
}
