//! `Sockets`: listening sockets that another process has opened, such as the service manager.

use std::os::fd::OwnedFd;

use super::listen::Listening;
use crate::{
    config::{
        Config, ControlConfig, MonitorConfig,
        suggest::{choice, nearest},
    },
    error::Error,
    sys::Listener,
};

/// Names of the sockets, each that of the section whose address it replaces.
const NAMES: [&str; 3] = ["proxy", "control", "monitor"];

/// Listening sockets that another process has opened for the proxy. It keeps them open, so they outlive a stop: clients that
/// come meanwhile wait for the next start.
#[derive(Debug, Default)]
pub struct Sockets {
    pub(super) proxy: Option<Listening>,
    pub(super) control: Option<Listening>,
    pub(super) monitor: Option<Listening>,
}

impl Sockets {
    /// Takes over a bound and listening stream socket, TCP or UNIX, in place of `proxy.addr`, `control.addr` or
    /// `monitor.addr`, as `name` says. Several sockets may have one name.
    pub fn add(&mut self, name: &str, socket: OwnedFd) -> Result<(), Error> {
        let place = match name {
            "proxy" => &mut self.proxy,
            "control" => &mut self.control,
            "monitor" => &mut self.monitor,
            _ => {
                let hint = nearest(name, NAMES)
                    .map_or_else(String::new, |name| format!("; did you mean {name}?"));
                return Err(Error::Config(format!(
                    "a passed socket has the unknown name {name:?}; write FileDescriptorName={} into its unit{hint}",
                    choice(&NAMES)
                )));
            }
        };
        let inherit = || match (Listener::inherit(socket)?, &mut *place) {
            (listener, Some(listening)) => listening.inherit(listener),
            (listener, none) => Listening::inherited(listener).map(|it| *none = Some(it)),
        };
        inherit().map_err(|error| {
            Error::Config(format!(
                "the passed socket {name:?} cannot be used: {error}; pass one that listens for streams"
            ))
        })
    }

    /// Writes the addresses of the sockets into a configuration, in place of its own, which have no effect.
    pub fn set_addresses(&self, config: &mut Config) {
        if let Some(proxy) = &self.proxy {
            config.proxy.addr = proxy.address.clone();
            config.proxy.mode = None;
        }
        if let Some(control) = &self.control {
            let hosts = std::mem::take(&mut config.control.hosts);
            config.control =
                ControlConfig { addr: control.address.clone(), hosts, ..ControlConfig::default() };
        }
        if let Some(monitor) = &self.monitor {
            config.monitor =
                MonitorConfig { addr: Some(monitor.address.clone()), ..MonitorConfig::default() };
        }
    }

    pub(super) fn announce(&self) {
        for (name, passed) in NAMES.into_iter().zip([&self.proxy, &self.control, &self.monitor]) {
            if passed.is_some() {
                log::info!(
                    "{name} takes the socket that was passed to it, so {name}.addr has no effect"
                );
            }
        }
    }
}
