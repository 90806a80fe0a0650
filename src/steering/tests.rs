//! Tests of the BPF side, in the network namespace of all tests.

use std::net::{SocketAddr, TcpListener, TcpStream};

use super::{bpf::Bpf, found::Found};

#[test]
fn a_client_is_steered_to_the_server() {
    let own = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut bpf = match Bpf::load(&[own.local_addr().unwrap()], None) {
        Ok(bpf) => bpf,
        Err(error) => return println!("skipped: {error}"),
    };
    bpf.attach().unwrap();
    assert_eq!(bpf.find(&[server.local_addr().unwrap()]).unwrap(), Found::Listener);
    bpf.steer_until(u64::MAX).unwrap();
    let client = TcpStream::connect(own.local_addr().unwrap()).unwrap();
    let (accepted, from): (TcpStream, SocketAddr) = server.accept().unwrap();
    assert_eq!(from, client.local_addr().unwrap());
    assert_eq!(accepted.local_addr().unwrap(), own.local_addr().unwrap());
    assert_eq!(bpf.assigned(), 1);
}
