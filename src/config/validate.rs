//! Conditions between settings.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    address::Address,
    fleet,
    settings::{Config, ControlConfig, MonitorConfig, TlsConfig, UpstreamConfig},
    values::{SendProxy, Steer},
};

/// Most worker threads: far more than a machine has cores, and few enough to start.
const THREADS_MAX: usize = 1024;

/// Most pipes of a worker: further ones would cost more memory than they save time.
const PIPES_MAX: usize = 1024;

/// Returns the first conflict as one line with the keys and the remedy.
pub(super) fn validate(config: &Config) -> Result<(), String> {
    check_tls(&config.proxy.tls)?;
    check_times(config)?;
    if config.proxy.threads.is_some_and(|threads| threads.get() > THREADS_MAX) {
        return Err(format!(
            "proxy.threads: the most are {THREADS_MAX}; leave it away for one thread a core"
        ));
    }
    if config.proxy.pipes.is_some_and(|pipes| pipes > PIPES_MAX) {
        return Err(format!("proxy.pipes: the most are {PIPES_MAX} for each thread"));
    }
    check_modes(config)?;
    config.upstream.addr.check_dialled().map_err(|error| format!("upstream.addr: {error}"))?;
    check_dialling(&config.upstream)?;
    check_listeners(config)?;
    check_steering(config)?;
    fleet::validate(config)
}

/// Refuses settings that steered connections would escape, or that leave nobody to be steered.
fn check_steering(config: &Config) -> Result<(), String> {
    match config.steering_conflict() {
        Some((key, why)) if config.upstream.steer == Steer::On => Err(format!(
            "upstream.steer: on goes with no {key}, as {why}; write `auto` or `off`, or leave {key} away"
        )),
        _ => Ok(()),
    }
}

impl Config {
    /// Returns the setting that keeps connections from being steered, and the reason.
    pub(crate) fn steering_conflict(&self) -> Option<(&'static str, &'static str)> {
        let (proxy, upstream) = (&self.proxy, &self.upstream);
        let is_tcp = |address: &Address| matches!(address, Address::Tcp { .. });
        let conflicts = [
            (!is_tcp(&proxy.addr), "proxy.addr of a UNIX socket", "only TCP can be steered"),
            (!is_tcp(&upstream.addr), "upstream.addr of a UNIX socket", "only TCP can be steered"),
            (
                upstream.send_proxy != SendProxy::Off,
                "upstream.send-proxy",
                "the server would get no header from steered clients, whose own addresses it sees",
            ),
            (
                !proxy.accept_proxy_from.is_empty(),
                "proxy.accept-proxy-from",
                "the server would get the headers of steered clients",
            ),
            (
                !upstream.source_addrs.is_empty(),
                "upstream.source-addrs",
                "steered clients come from their own addresses",
            ),
        ];
        conflicts.into_iter().find(|(is_set, ..)| *is_set).map(|(_, key, why)| (key, why))
    }
}

/// Refuses the mode of a file that there is not.
fn check_modes(config: &Config) -> Result<(), String> {
    let Config { proxy, control, monitor, .. } = config;
    let control_mode = Some(control.mode).filter(|&mode| mode != ControlConfig::default().mode);
    let monitor_mode = Some(monitor.mode).filter(|&mode| mode != MonitorConfig::default().mode);
    for (section, addr, mode) in [
        ("proxy", Some(&proxy.addr), proxy.mode),
        ("control", Some(&control.addr), control_mode),
        ("monitor", monitor.addr.as_ref(), monitor_mode),
    ] {
        if mode.is_some() && !matches!(addr, Some(Address::Unix(_))) {
            let addr = addr.map_or("not set".to_owned(), ToString::to_string);
            return Err(format!(
                "{section}.mode: {section}.addr ({addr}) has no file that could have a mode; write `unix:///absolute/path` there, or leave the mode away"
            ));
        }
    }
    if control.group.is_some() && !matches!(control.addr, Address::Unix(_)) {
        return Err(format!(
            "control.group: control.addr ({}) has no file that could have a group; write `unix:///absolute/path` there, or leave the group away",
            control.addr
        ));
    }
    // A connect needs the right to write. With a group, the default mode counts as 0660.
    if control.group.is_some() && control_mode.is_some_and(|mode| mode & 0o020 == 0) {
        return Err(format!(
            "control.group: control.mode ({:04o}) does not let the group connect; write `0660` there, or leave the mode or the group away",
            control.mode
        ));
    }
    Ok(())
}

/// Refuses listeners that cannot both be bound, or that the upstream leads back to.
fn check_listeners(config: &Config) -> Result<(), String> {
    let upstream = &config.upstream.addr;
    let mut before: Vec<(&str, &Address)> = Vec::new();
    for (key, listener) in [
        ("proxy.addr", Some(&config.proxy.addr)),
        ("control.addr", Some(&config.control.addr)),
        ("monitor.addr", config.monitor.addr.as_ref()),
    ] {
        let Some(listener) = listener else { continue };
        if let Some((other, taken)) = before.iter().find(|(_, it)| same_listener(it, listener)) {
            return Err(format!(
                "{key}: {listener} is taken by {other} ({taken}); give one of them another port or path"
            ));
        }
        before.push((key, listener));
    }
    for (key, listener) in before {
        if leads_to(upstream, listener) {
            return Err(format!(
                "upstream.addr: {upstream} leads back to {key} ({listener}); write where the server behind the proxy listens"
            ));
        }
    }
    Ok(())
}

/// Refuses bounds of zero, which would end a pause or a hold at once.
fn check_times(config: &Config) -> Result<(), String> {
    if config.pause.max_ttl.is_some_and(|ttl| ttl.is_zero()) {
        return Err(
            "pause.max-ttl: 0s would end each pause at once; write how long one may last, as in `10m`, or leave it away for no bound"
                .to_owned(),
        );
    }
    if config.hold.timeout.is_some_and(|timeout| timeout.is_zero()) {
        return Err(
            "hold.timeout: 0s would hold nobody; write how long a client may be held, as in `30s`, leave it away for no bound, or set proxy.reject-clients"
                .to_owned(),
        );
    }
    Ok(())
}

fn check_dialling(upstream: &UpstreamConfig) -> Result<(), String> {
    if upstream.connect_timeout.is_zero() {
        return Err(
            "upstream.connect-timeout: 0s leaves no time to connect; write how long it may take, as in `5s`"
                .to_owned(),
        );
    }
    if let Some(file) = upstream.state_file.as_ref().filter(|file| !file.is_absolute()) {
        return Err(format!(
            "upstream.state-file: {} is relative to the folder of each start; write an absolute path, as in `/var/lib/tcpause/upstream.json`",
            file.display()
        ));
    }
    let sources = &upstream.source_addrs;
    match &upstream.addr {
        _ if sources.is_empty() => Ok(()),
        Address::Unix(_) | Address::Abstract(_) => Err(format!(
            "upstream.source-addrs: {} is a UNIX socket, which is reached from no address; leave upstream.source-addrs away",
            upstream.addr
        )),
        Address::Tcp { host, .. } => match host.parse::<IpAddr>() {
            Ok(ip) if sources.iter().all(|it| it.to_canonical().is_ipv4() != ip.is_ipv4()) => {
                let version = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
                Err(format!(
                    "upstream.source-addrs: none of them is {version}, as upstream.addr ({}) is; add one of this host",
                    upstream.addr
                ))
            }
            _ => Ok(()),
        },
    }
}

fn check_tls(tls: &TlsConfig) -> Result<(), String> {
    match (&tls.cert, &tls.key, &tls.ca_cert) {
        (Some(_), None, _) => Err("proxy.tls.key is missing: proxy.tls.cert needs the private key that belongs to it".to_owned()),
        (None, Some(_), _) => Err("proxy.tls.cert is missing: proxy.tls.key needs the certificate that belongs to it".to_owned()),
        (None, None, Some(_)) => {
            Err("proxy.tls.ca-cert needs proxy.tls.cert and proxy.tls.key: without them nothing is answered in TLS".to_owned())
        }
        _ => Ok(()),
    }
}

/// Returns true if two listeners surely cannot both be bound. Names are not looked up.
fn same_listener(left: &Address, right: &Address) -> bool {
    meet(left, right, |left, right| {
        let either = left.is_unspecified() || right.is_unspecified();
        left == right || left.is_ipv4() == right.is_ipv4() && either
    })
}

/// Returns true if dialling `upstream` surely reaches `listener`. The addresses of this host are not known here.
fn leads_to(upstream: &Address, listener: &Address) -> bool {
    meet(upstream, listener, |dialled, bound| {
        let is_local = dialled.is_loopback() || dialled.is_unspecified();
        dialled == bound
            || dialled.is_ipv4() == bound.is_ipv4() && is_local && bound.is_unspecified()
            || dialled.is_unspecified() && bound.is_loopback()
    })
}

/// Returns true if two addresses are the same, or have the same port and IP addresses for which `do_meet` holds. Port 0 never
/// matches, as the system chooses another port each time.
fn meet(left: &Address, right: &Address, do_meet: impl Fn(&IpAddr, &IpAddr) -> bool) -> bool {
    match (left, right) {
        (Address::Tcp { host: left, port }, Address::Tcp { host: right, port: other }) => {
            let meets = |left| ips(right).iter().any(|right| do_meet(left, right));
            let is_same = left.eq_ignore_ascii_case(right) || ips(left).iter().any(meets);
            port == other && *port != 0 && is_same
        }
        _ => left == right,
    }
}

/// Returns the IP addresses that a host stands for; none for a name that would have to be looked up.
fn ips(host: &str) -> Vec<IpAddr> {
    match host {
        "" => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        _ if host.eq_ignore_ascii_case("localhost") => vec![Ipv4Addr::LOCALHOST.into()],
        _ => host.parse().into_iter().collect(),
    }
}
