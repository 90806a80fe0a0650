//! `Http`: one exchange with an endpoint, over a connection that is kept and has a number.

use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use ureq::{
    Agent, Body,
    config::Config,
    http::{Response, Uri},
    tls::TlsConfig,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport},
    },
};

use super::{
    answer::HttpAnswer,
    failure::{self, Failure, Phase},
};

/// Most bytes of an answer: some 3,000 hosts.
const ANSWER_BYTES_MAX: u64 = 2 << 20;

/// Time for which a connection is kept without a request, beyond the longest period of a member.
const IDLE_MAX: Duration = Duration::from_secs(3600);

/// Bytes of each buffer of a connection.
const BUFFER_BYTES: usize = 16 << 10;

/// Client of HTTP, and the numbers of its connections.
#[derive(Debug)]
pub(super) struct Http {
    agent: Agent,
    numbers: Arc<Numbers>,
    has_cert: bool,
}

/// Counts of connections, by which a new one is told from one that was kept.
#[derive(Debug, Default)]
struct Numbers {
    begun: AtomicU64,
    made: AtomicU64,
}

impl Http {
    pub(super) fn new(tls: TlsConfig) -> Self {
        let has_cert = tls.client_cert().is_some();
        let numbers = Arc::default();
        Self { agent: agent(tls, &numbers), numbers, has_cert }
    }

    pub(super) fn tls(&self) -> TlsConfig {
        self.agent.config().tls_config().clone()
    }

    /// Returns a number that no connection has.
    pub(super) fn next_number(&self) -> u64 {
        self.numbers.begun.fetch_add(1, Ordering::Relaxed);
        self.numbers.made.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn get(
        &self,
        url: &str,
        path: &str,
        deadline: Instant,
    ) -> Result<HttpAnswer, Failure> {
        self.exchange(url, deadline, Phase::Greet, |left| {
            let request =
                self.agent.get(format!("{url}{path}")).config().timeout_global(Some(left));
            request.build().call()
        })
    }

    pub(super) fn post(
        &self,
        url: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
        deadline: Instant,
    ) -> Result<HttpAnswer, Failure> {
        self.exchange(url, deadline, Phase::Answer, |left| {
            let request =
                self.agent.post(format!("{url}{path}")).config().timeout_global(Some(left));
            let request = request.build().header("content-type", "application/json");
            match token {
                Some(token) if !token.is_empty() => {
                    request.header("authorization", token).send(body)
                }
                _ => request.send(body),
            }
        })
    }

    fn exchange(
        &self,
        url: &str,
        deadline: Instant,
        phase: Phase,
        send: impl FnOnce(Duration) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<HttpAnswer, Failure> {
        let (begun, made) = self.numbers.now();
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = send(left).and_then(|mut response| {
            // Only a connection whose answer was read to its end is kept.
            let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
            let location = response.headers().get("location");
            Ok(HttpAnswer {
                status: response.status().as_u16(),
                location: location.map(|it| String::from_utf8_lossy(it.as_bytes()).into_owned()),
                body,
                connection: None,
            })
        });
        let now = self.numbers.now();
        match answer {
            Ok(answer) => Ok(HttpAnswer { connection: (now.1 > made).then_some(now.1), ..answer }),
            Err(error) => {
                let is_connected = now.0 == begun || now.1 > made;
                let phase = if is_connected { phase } else { Phase::Connect };
                Err(failure::of_http(url, &error, phase, self.has_cert))
            }
        }
    }
}

/// Returns a client that trusts nothing but `tls`, and neither follows redirects nor uses a proxy of the environment.
fn agent(tls: TlsConfig, numbers: &Arc<Numbers>) -> Agent {
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .user_agent(concat!("tcpause/", env!("CARGO_PKG_VERSION")))
        .max_idle_connections_per_host(1)
        .max_idle_age(IDLE_MAX)
        .input_buffer_size(BUFFER_BYTES)
        .output_buffer_size(BUFFER_BYTES)
        .build();
    let dialer = Dialer { inner: DefaultConnector::new(), numbers: Arc::clone(numbers) };
    Agent::with_parts(config, dialer, Unresolved)
}

/// Returns a client for one stream, whose connections need no number.
pub(super) fn agent_of_watch(tls: TlsConfig) -> Agent {
    agent(tls, &Arc::default())
}

impl Numbers {
    fn now(&self) -> (u64, u64) {
        (self.begun.load(Ordering::Relaxed), self.made.load(Ordering::Relaxed))
    }
}

/// Looks up no name: the dialer does so, as a request over a kept connection needs no look-up.
#[derive(Debug)]
struct Unresolved;

impl Resolver for Unresolved {
    fn resolve(
        &self,
        _: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

/// Connects, and counts the connections.
#[derive(Debug)]
struct Dialer {
    inner: DefaultConnector,
    numbers: Arc<Numbers>,
}

impl Connector for Dialer {
    type Out = Box<dyn Transport>;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        self.numbers.begun.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let mut addrs = details.resolver.empty();
        for addr in look_up(details.uri, details.timeout)? {
            addrs.push(addr);
        }
        let spent = began.elapsed();
        let timeout = NextTimeout {
            after: details.timeout.after.saturating_sub(spent).into(),
            ..details.timeout
        };
        let details = ConnectionDetails {
            uri: details.uri,
            addrs,
            config: details.config,
            request_level: details.request_level,
            resolver: details.resolver,
            now: (details.current_time)(),
            timeout,
            current_time: Arc::clone(&details.current_time),
            run_connector: Arc::clone(&details.run_connector),
            register_shutdown: Arc::clone(&details.register_shutdown),
        };
        let transport = self.inner.connect(&details, chained)?;
        self.numbers.made.fetch_add(1, Ordering::Relaxed);
        Ok(transport)
    }
}

/// Most addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;

/// Looks the host of `uri` up. The system cannot be told to give up, so a name is looked up by a thread of its own.
fn look_up(uri: &Uri, timeout: NextTimeout) -> Result<Vec<SocketAddr>, ureq::Error> {
    let port = uri.port_u16().ok_or(ureq::Error::HostNotFound)?;
    let host =
        uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (sender, found) = mpsc::sync_channel(1);
    thread::Builder::new().name("fleet-names".to_owned()).spawn(move || {
        // An error means that nobody waits any more.
        drop(sender.send((host.as_str(), port).to_socket_addrs()));
    })?;
    let found =
        found.recv_timeout(*timeout.after).map_err(|_| ureq::Error::Timeout(timeout.reason))?;
    let found: Vec<SocketAddr> =
        found.map_err(|_| ureq::Error::HostNotFound)?.take(ADDRESSES_MAX).collect();
    if found.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(found) }
}
