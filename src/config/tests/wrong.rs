//! Keys and values that are refused, each with its place and the remedy.

use super::check_error;

#[test]
fn wrong_keys_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        ("prxy:\n  addr: :80", "t.yml:1:1: unknown key `prxy`; did you mean `proxy`?"),
        ("\nproxy:\n  adr: :80", "t.yml:3:3: proxy: unknown key `adr`; did you mean `addr`?"),
        (
            "proxy:\n  tls:\n    crt: x",
            "t.yml:3:5: proxy.tls: unknown key `crt`; did you mean `cert`?",
        ),
        (
            "proxy:\n  reject_clients: true",
            "t.yml:2:3: proxy: unknown key `reject_clients`; did you mean `reject-clients`?",
        ),
        ("threads: 3", "t.yml:1:1: unknown key `threads`; did you mean `proxy.threads`?"),
        (
            "addr: :3",
            "t.yml:1:1: unknown key `addr`; did you mean `proxy.addr`, `control.addr`, `monitor.addr`, `upstream.addr`?",
        ),
        (
            "proxy:\n  x: 3",
            "t.yml:2:3: proxy: unknown key `x`; known here: `addr`, `mode`, `reject-clients`,",
        ),
        (
            "proxy.addr: :3",
            "t.yml:1:1: unknown key `proxy.addr`; write the part before each dot on a line of its own, `proxy:`",
        ),
        ("\"a\\nb\": 3", "t.yml:1:1: unknown key `a\\nb`; known here:"),
        ("<<: {grace-period: 1s}", "t.yml:1:1: unknown key `<<`"),
        ("3: 3", "t.yml:1:1: unknown key `3`"),
        ("? [a]\n: 3", "t.yml:1:3: invalid type: sequence, expected a key"),
        (
            "grace-period: 1s\ngrace-period: 2s",
            "t.yml:2:1: the key `grace-period` is here for the second time; remove one",
        ),
        ("proxy: {}\nproxy: {}", "t.yml:2:1: the key `proxy` is here for the second time"),
        (
            "proxy:\n  addr: :1\n  addr: :1",
            "t.yml:3:3: proxy: the key `addr` is here for the second time",
        ),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_values_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        (
            "grace-period: 30",
            "t.yml:1:15: grace-period: \"30\" ends without a unit; did you mean `30s`?",
        ),
        (
            "grace-period: 1.5",
            "t.yml:1:15: grace-period: \"1.5\" ends without a unit; did you mean `1.5s`?",
        ),
        ("grace-period: -3s", "t.yml:1:15: grace-period: \"-3s\" has a sign"),
        ("grace-period: 1d", "t.yml:1:15: grace-period: \"1d\" has the unknown unit \"d\""),
        ("grace-period: ''", "t.yml:1:15: grace-period: a duration is missing"),
        (
            "grace-period: [1s]",
            "t.yml:1:15: grace-period: invalid type: sequence, expected one value, such as `10s`",
        ),
        (
            "grace-period: {a: 1s}",
            "t.yml:1:15: grace-period: invalid type: map, expected one value, such as `10s`",
        ),
        (
            "proxy: 3000",
            "t.yml:1:8: proxy: invalid type: integer `3000`, expected the keys `addr`, `mode`, `reject-clients`,",
        ),
        ("proxy: [a]", "t.yml:1:8: proxy: invalid type: sequence, expected the keys `addr`,"),
        ("- a", "t.yml:1:1: invalid type: sequence, expected the keys `grace-period`,"),
        ("tcpause", "t.yml:1:1: invalid type: string \"tcpause\", expected the keys"),
        (
            "proxy:\n  addr: 3000",
            "t.yml:2:9: proxy.addr: \"3000\" is only a number; did you mean `:3000`?",
        ),
        ("proxy:\n  addr: localhost", "t.yml:2:9: proxy.addr: \"localhost\" lacks a port;"),
        (
            "upstream:\n  addr: unix://x",
            "t.yml:2:9: upstream.addr: \"unix://x\" has a relative path; did you mean",
        ),
        (
            "proxy:\n  reject-clients: yes",
            "t.yml:2:19: proxy.reject-clients: \"yes\" is not a boolean; write true or false",
        ),
        ("proxy:\n  reject-clients: on", "write true or false"),
        ("proxy:\n  reject-clients: 1", "write true or false"),
        (
            "proxy:\n  reject-clients: [true]",
            "invalid type: sequence, expected one value, such as `false`",
        ),
        (
            "proxy:\n  threads: 0",
            "t.yml:2:12: proxy.threads: \"0\" is not a number of threads; write 1 or more",
        ),
        ("proxy:\n  pipes: -1", "write 0 or more"),
        ("proxy:\n  max-connections: 0", "\"0\" is not a number of connections; write 1 or more"),
        (
            "upstream:\n  source-addrs: [127.0.0.1:80]",
            "upstream.source-addrs: \"127.0.0.1:80\" is not an IP address; write addresses of this host",
        ),
        ("upstream:\n  source-addrs: [lo]", "\"lo\" is not an IP address"),
        ("proxy:\n  threads: -1", "write 1 or more"),
        ("proxy:\n  threads: 1.5", "write 1 or more"),
        ("proxy:\n  threads: many", "write 1 or more"),
        ("proxy:\n  threads: 99999999999999999999999", "write 1 or more"),
        ("proxy:\n  tls:\n    cert: ''", "t.yml:3:11: proxy.tls.cert: a path is missing"),
        ("proxy:\n  tls:\n    cert: \"a\\0\"", "has a control character"),
        (
            "log-level: loud",
            "t.yml:1:12: log-level: \"loud\" is not a level; the levels are off, error, warn, info, debug, trace",
        ),
        ("log-level: inf", "did you mean `info`?"),
        (
            "log:\n  format: jsno",
            "t.yml:2:11: log.format: \"jsno\" is no format of the log; write auto, text, json; did you mean `json`?",
        ),
        ("log:\n  format: JSON", "did you mean `json`?"),
        ("log:\n  format: ''", "\"\" is no format of the log; write auto, text, json"),
        (
            "control:\n  hosts: a.example",
            "t.yml:2:10: control.hosts: invalid type: string \"a.example\", expected a list, such as",
        ),
        ("control:\n  hosts: [a:80]", "t.yml:2:10: control.hosts: \"a:80\" is not a host name"),
        ("control:\n  hosts: ['']", "a host name is missing"),
        ("control:\n  hosts: [[a]]", "invalid type: sequence, expected a string"),
        (
            "proxy:\n\taddr: :3",
            "t.yml:2:1: found character that cannot start any token, while scanning for the next token; indent with spaces",
        ),
        ("proxy: {", "t.yml:2:1: "),
        ("log-level: *b", "unknown anchor"),
        (
            "grace-period: 1s\n---\ngrace-period: 1s",
            "t.yml: deserializing from YAML containing more than one document",
        ),
        ("proxy:\n  addr: \"a\\nb\"", "\"a\\nb\" has white space or a control character"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_bounds_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        ("pause:\n  max-ttl: 10", "t.yml:2:12: pause.max-ttl: \"10\" ends without a unit"),
        ("hold:\n  timeout: soon", "t.yml:2:12: hold.timeout: \"soon\""),
        (
            "hold:\n  max: 0",
            "t.yml:2:8: hold.max: \"0\" is not a number of held clients; write 1 or more, or leave it away for no bound",
        ),
        (
            "hold:\n  overflow: drop",
            "t.yml:2:13: hold.overflow: \"drop\" is nothing that can be done with a client; write reject, close, backlog",
        ),
        ("hold:\n  overflow: rejct", "write reject, close, backlog; did you mean `reject`?"),
        ("hold:\n  overflow: back-log", "did you mean `backlog`?"),
        (
            "resume:\n  max-connecting: 0",
            "t.yml:2:19: resume.max-connecting: \"0\" is not a number of connections; write 1 or more, or leave it away for 128",
        ),
        (
            "resume:\n  rate: 0",
            "t.yml:2:9: resume.rate: \"0\" is not a number of clients in a second; write 1 or more, or leave it away",
        ),
        ("resume:\n  rate: 0.5", "\"0.5\" is not a number of clients in a second"),
        ("resume:\n  rate: 4294967296", "is not a number of clients in a second"),
        ("upstream:\n  retry-for: 30", "upstream.retry-for: \"30\" ends without a unit; did you"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_modes_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        (
            "proxy:\n  mode: 666x",
            "t.yml:2:9: proxy.mode: \"666x\" is not the mode of a socket; write three octal digits behind a 0, as in `0660`",
        ),
        ("proxy:\n  mode: ''", "is not the mode of a socket"),
        ("proxy:\n  mode: 6", "is not the mode of a socket"),
        ("proxy:\n  mode: 0o", "is not the mode of a socket"),
        ("proxy:\n  mode: +660", "is not the mode of a socket"),
        ("proxy:\n  mode: -660", "is not the mode of a socket"),
        ("proxy:\n  mode: 01777", "is not the mode of a socket"),
        ("proxy:\n  mode: rw-rw----", "is not the mode of a socket"),
        ("proxy:\n  mode: 77777777777777777777", "is not the mode of a socket"),
        ("proxy:\n  mode: 0066", "keeps the socket's own user out"),
        // A tool that reads and rewrites YAML makes these numbers of 0660, 0600 and 0777.
        (
            "control:\n  mode: 432",
            "t.yml:2:9: control.mode: \"432\" keeps the socket's own user out",
        ),
        ("control:\n  mode: 384", "is not the mode of a socket"),
        ("control:\n  mode: 511", "keeps the socket's own user out"),
    ] {
        check_error(text, expected);
    }
}

#[test]
fn wrong_values_about_proxy_headers_are_told_with_their_place_and_the_remedy() {
    for (text, expected) in [
        (
            "upstream:\n  send-proxy: v3",
            "t.yml:2:15: upstream.send-proxy: \"v3\" is no version of the PROXY protocol; write off, v1, v2; did you mean",
        ),
        (
            "proxy:\n  accept-proxy-from: [10.0.0/8]",
            "t.yml:2:22: proxy.accept-proxy-from: \"10.0.0/8\" is no network; write 10.0.0.0/8",
        ),
        ("proxy:\n  accept-proxy-from: [unx]", "or fd00::/8; did you mean `unix`?"),
    ] {
        check_error(text, expected);
    }
}
