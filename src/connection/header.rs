//! Headers of the PROXY protocol: the one that a client may begin with, and the one that its upstream gets.
//!
//! A client's header is only peeked while the client waits, so that all of it stays in the kernel. It is read once the relay
//! or a rejection begins.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    Connection, Context, Session, Verdict, deadline::Deadline, endpoint::Received, record::Record,
};
use crate::{
    config::SendProxy,
    proxy_header::{
        Defect, HEADER_BYTES_MAX, Parsed, ProxiedAddresses, ProxyHeaders, header_of, parse,
    },
    stats::cause::CloseCause,
};

/// Life of a connection that its upstream counts as having closed at once, at most.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Header that a client begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum ClientHeader {
    /// There is none, or it was read.
    #[default]
    Absent,
    /// It is not there yet, or in part.
    Awaited,
    /// It is there, has this length, and was not read yet.
    Unread(u16),
}

impl ClientHeader {
    /// Returns true if there is none.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks this way")]
    pub(super) fn is_absent(&self) -> bool {
        *self == Self::Absent
    }
}

impl Connection {
    /// Returns true if the client is to begin with a header.
    pub(crate) fn owes_header(&self, headers: &ProxyHeaders) -> bool {
        let client = self.record.client();
        let has_address = client.is_some() || self.client.socket().is_unix();
        has_address && headers.are_sent_by(client)
    }

    /// Begins to wait for the client's header. While the proxy `is_paused`, the client is held meanwhile.
    pub(crate) fn await_header(&mut self, is_paused: bool) -> Verdict {
        if is_paused {
            self.record.begin_wait();
        }
        self.record.header = ClientHeader::Awaited;
        Verdict::Wait(Deadline::AwaitingHeader)
    }

    /// Looks for the header, whose time is over if it `is_late`. Nothing is read. A client that has sent nothing else and ended
    /// its stream is a health check. One whose header names no client is given a moment for that.
    pub(super) fn look_for_header(&mut self, is_late: bool, context: &Context<'_>) -> Verdict {
        let mut bytes = [0; HEADER_BYTES_MAX + 1];
        let client = &mut self.client;
        let received =
            if client.is_readable() { client.peek(&mut bytes) } else { Received::Nothing };
        let (parsed, count) = match received {
            Received::Bytes(count) => (parse(bytes.get(..count).unwrap_or_default()), count),
            Received::Nothing if is_late => return self.refuse_header(Defect::Late, context),
            Received::Nothing => return Verdict::Stay,
            Received::End | Received::Reset | Received::Unsupported => {
                return Verdict::Close(self.left());
            }
        };
        match parsed {
            Parsed::Header { bytes, addresses: None }
                if bytes == count && !is_late && !self.client.is_read_closed() =>
            {
                Verdict::Wait(Deadline::AwaitingByte)
            }
            Parsed::Header { bytes, addresses } => {
                self.record.header = ClientHeader::Unread(u16::try_from(bytes).unwrap_or(u16::MAX));
                if let Some(ProxiedAddresses { source, .. }) = addresses {
                    self.record.came_from(source);
                }
                if self.has_gone() { Verdict::Close(self.left()) } else { Verdict::Admit }
            }
            Parsed::Partial if self.client.is_reset() => Verdict::Close(self.left()),
            Parsed::Partial if self.client.is_read_closed() => {
                self.refuse_header(Defect::Ended, context)
            }
            Parsed::Partial if is_late => self.refuse_header(Defect::Late, context),
            Parsed::Partial => Verdict::Stay,
            Parsed::Wrong(defect) => self.refuse_header(defect, context),
        }
    }

    /// Closes a client without a proper header.
    fn refuse_header(&self, defect: Defect, context: &Context<'_>) -> Verdict {
        context.proxy_headers.log_wrong(&self.client_name(), defect, context.now);
        Verdict::Close(CloseCause::BadProxyHeader)
    }

    /// Returns true if a client whose own bytes are not read yet has gone (see [`Socket::has_gone`]).
    ///
    /// [`Socket::has_gone`]: crate::sys::Socket::has_gone
    pub(super) fn has_gone(&self) -> bool {
        let header = match self.record.header {
            ClientHeader::Unread(bytes) => bytes.into(),
            ClientHeader::Absent | ClientHeader::Awaited => 0,
        };
        self.client.socket().has_gone(header)
    }

    /// Reads the client's header, if it has one that was not read yet, and returns what it tells. It is lost if the client
    /// has reset meanwhile; then returns the cause of the end, which is `left`.
    pub(super) fn take_header(
        &mut self,
        left: CloseCause,
    ) -> Result<Option<ProxiedAddresses>, CloseCause> {
        let ClientHeader::Unread(length) = std::mem::take(&mut self.record.header) else {
            return Ok(None);
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let header = bytes.get_mut(..length.into()).unwrap_or_default();
        let mut read = 0;
        while let Some(rest @ [_, ..]) = header.get_mut(read..) {
            // A read may stop, at a message with descriptors.
            match self.client.recv(rest) {
                Received::Bytes(count) => read += count,
                _ => return Err(left),
            }
        }
        match parse(header) {
            Parsed::Header { addresses, .. } => Ok(addresses),
            Parsed::Partial | Parsed::Wrong(_) => Err(CloseCause::BadProxyHeader),
        }
    }

    /// Returns the header by which the upstream learns of the client; none if it is not to. The client's own header has
    /// told `addresses`.
    pub(super) fn header_for_upstream(
        &self,
        addresses: Option<ProxiedAddresses>,
        context: &Context<'_>,
    ) -> Option<Box<[u8]>> {
        let version = context.proxy_headers.send;
        if version == SendProxy::Off {
            return None;
        }
        let addresses = addresses.or_else(|| {
            let source = self.record.client()?;
            let destination = self.client.socket().local_inet();
            // A client of a UNIX socket whose header was read for a rejection that did not come.
            let destination = destination.unwrap_or_else(|| unspecified_like(source));
            Some(ProxiedAddresses { source, destination })
        });
        Some(header_of(version, addresses, &self.record.id().to_string()))
    }
}

impl Session {
    /// Asks the operator about headers if this upstream has ended its stream soon, and none has ever sent a byte. So servers
    /// do that expect a header and get none, or get one and expect none.
    pub(super) fn ask_about_header(&self, record: &Record, context: &Context<'_>) {
        if !self.relay.can_answer()
            && record.connected_for(context.now) < AT_ONCE
            && context.workers.sum(|counters| &counters.bytes_to_client) == 0
        {
            context.proxy_headers.ask(self.target.target().address());
        }
    }
}

/// Returns the unspecified address of the same family.
fn unspecified_like(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, 0)
}
