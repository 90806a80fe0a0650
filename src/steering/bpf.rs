//! The BPF programs of `steer.bpf.c` and their maps: loaded, attached and asked.

use std::{
    error::Error,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions, include_bytes_aligned,
    maps::{Array, Map, MapData, MapError, SkStorage, SockMap},
    programs::{Program, ProgramError, SchedClassifier, SkLookup, sk_lookup::SkLookupLinkId},
};
use rustix::{
    io::Errno,
    net::getsockname,
    thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query},
};

use super::found::{Found, Unavailable};

/// Programs of the object.
const STEER: &str = "steer";
const FIND: &str = "find";
/// Words of the map `state`.
const UNTIL: u32 = 0;
const ASSIGNED: u32 = 1;
const TAKEN: u32 = 2;

/// Slots for listeners of the server, so that one member of a group (`SO_REUSEPORT`) may leave.
const SLOTS: u32 = 4;
/// Most addresses of our own.
const ADDRESSES_MAX: usize = 8;
/// Shortest packet that the kernel runs a program on; the Ethernet header before the question.
const PACKET_BYTES: usize = 64;
const HEADER_BYTES: usize = 14;
/// `ENOTSUPP`, an error of the kernel that is not meant for users.
const NOT_SUPPORTED: i32 = 524;

/// Programs and maps in the kernel, and the link once they are attached. All of it ends with this value.
pub(super) struct Bpf {
    listen: Box<[SocketAddr]>,
    programs: Ebpf,
    link: Option<SkLookupLinkId>,
    maps: Mutex<Maps>,
    marks: OwnedFd,
}

struct Maps {
    state: Array<MapData, u64>,
    servers: SockMap<MapData>,
    catchers: SockMap<MapData>,
    marks: SkStorage<MapData, u32>,
}

impl Bpf {
    /// Loads all for a proxy that listens at `listen`, which is one port: `::` takes IPv4, too. `marks` is the map of an
    /// earlier instance, as connections that its listener has not handed out yet inherit their marks from there.
    pub(super) fn load(listen: &[SocketAddr], marks: Option<OwnedFd>) -> Result<Self, Unavailable> {
        if !membarrier_query().contains(MembarrierQuery::GLOBAL) {
            return Err(no_barrier());
        }
        let mut programs = load_object(listen)?;
        let mut take = |name: &str| {
            let map = programs.take_map(name);
            map.ok_or_else(|| unavailable("takes a map", &MapError::ElementNotFound))
        };
        let opens = |error: MapError| unavailable("opens a map", &error);
        let state = Array::try_from(take("state")?).map_err(opens)?;
        let servers = SockMap::try_from(take("servers")?).map_err(opens)?;
        let catchers = SockMap::try_from(take("catchers")?).map_err(opens)?;
        let storage = match marks {
            Some(marks) => MapData::from_fd(marks).and_then(Map::from_map_data).map_err(opens)?,
            None => take("marks")?,
        };
        let descriptor = match &storage {
            Map::SkStorage(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        let descriptor = descriptor.map_err(|error| unavailable("copies a map", &error))?;
        let storage = SkStorage::try_from(storage).map_err(opens)?;
        let maps = Mutex::new(Maps { state, servers, catchers, marks: storage });
        let loads = |error: ProgramError| unavailable("loads a program", &error);
        program::<SkLookup>(&mut programs, STEER)?.load().map_err(loads)?;
        program::<SchedClassifier>(&mut programs, FIND)?.load().map_err(loads)?;
        Ok(Self { listen: listen.into(), programs, link: None, maps, marks: descriptor })
    }

    /// Attaches the program to this thread's network namespace. It steers nothing before [`Self::steer_until`].
    pub(super) fn attach(&mut self) -> Result<(), Unavailable> {
        let namespace = File::open("/proc/thread-self/ns/net")
            .map_err(|error| unavailable("opens the network namespace", &error))?;
        self.link = Some(self.attach_to(namespace)?);
        Ok(())
    }

    /// Finds the listeners that a dial to `server` would reach, and steers to them from now on. Those found before are
    /// forgotten.
    pub(super) fn find(&self, server: &[SocketAddr]) -> Result<Found, Unavailable> {
        let server: Vec<SocketAddr> = server.iter().copied().map(dialled).collect();
        // Other hosts of the same name are to get their share, by relay.
        let is_here = !server.is_empty() && server.iter().all(|server| is_local(*server));
        let steered = server.iter().filter(|server| is_here && !self.is_own(**server));
        let strange: Vec<SocketAddr> = steered.copied().collect();
        let mut found = match (is_here, strange.is_empty()) {
            (false, _) => Found::Elsewhere,
            (true, true) => Found::Own,
            (true, false) => Found::Nobody,
        };
        // Several addresses share the slots.
        let mut places = strange.iter().cycle();
        for slot in 0..SLOTS {
            let Some(&server) = places.next() else {
                // An empty slot is no failure.
                self.lock().servers.clear_index(&slot).ok();
                continue;
            };
            match self.ask(&question(slot, server))? {
                Found::Listener => found = Found::Listener,
                other @ (Found::Mptcp | Found::Device) if found == Found::Nobody => found = other,
                _ => {}
            }
        }
        Ok(found)
    }

    /// Has clients steered until then, in nanoseconds of `CLOCK_BOOTTIME`. 0 ends it; those in progress are known only after
    /// [`Self::settle`].
    pub(super) fn steer_until(&self, until: u64) -> io::Result<()> {
        self.lock().state.set(UNTIL, until, 0).map_err(io::Error::other)
    }

    /// Returns how many SYNs were steered; a repeated one counts again.
    pub(super) fn assigned(&self) -> u64 {
        self.word(ASSIGNED)
    }

    /// Returns how many SYNs to our address another program has taken before: it decides, and a pause does not hold them.
    pub(super) fn taken(&self) -> u64 {
        self.word(TAKEN)
    }

    /// Marks a socket as ours, so that it does not count as steered. All that a listener accepts inherits its mark.
    pub(super) fn mark(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.lock().marks.insert(&socket, 1, 0).map_err(io::Error::other)
    }

    /// Lends the map of marks, for the dump of connections and for a successor.
    pub(super) fn marks(&self) -> BorrowedFd<'_> {
        self.marks.as_fd()
    }

    /// Gives `listener`, which is bound to another port, all clients of its family that are not steered; one of `::` gets those
    /// of IPv4 too, where no other does. It ends when the listener closes.
    pub(super) fn catch(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        let is_ipv6 = SocketAddr::try_from(getsockname(listener)?)?.is_ipv6();
        self.lock().catchers.set(is_ipv6.into(), &listener, 0).map_err(io::Error::other)
    }

    /// Waits until each SYN that was under way has passed the program and is in the table of connections.
    pub(super) fn settle() -> Result<(), Unavailable> {
        membarrier(MembarrierCommand::Global).map_err(|_error| no_barrier())
    }

    fn lock(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, word: u32) -> u64 {
        self.lock().state.get(&word, 0).unwrap_or_default()
    }

    fn is_own(&self, server: SocketAddr) -> bool {
        self.listen.iter().any(|own| {
            let ip = own.ip().to_canonical();
            let is_at = match ip {
                IpAddr::V4(ip) => ip.is_unspecified() && server.is_ipv4(),
                IpAddr::V6(ip) => ip.is_unspecified(),
            };
            own.port() == server.port() && (is_at || ip == server.ip())
        })
    }

    /// Attaches it to a network namespace.
    fn attach_to(&mut self, namespace: impl AsFd) -> Result<SkLookupLinkId, Unavailable> {
        let attached = program::<SkLookup>(&mut self.programs, STEER)?.attach(namespace);
        attached.map_err(|error| unavailable("attaches the program", &error))
    }

    /// Runs the program that searches.
    fn ask(&self, question: &[u8]) -> Result<Found, Unavailable> {
        let run = |program: &Program| {
            let program: &SchedClassifier = program.try_into()?;
            program.test_run(TestRunOptions { data_in: Some(question), ..TestRunOptions::new() })
        };
        let program = self.programs.program(FIND).ok_or(ProgramError::NotLoaded);
        let answer =
            program.and_then(run).map_err(|error| unavailable("runs a program", &error))?;
        match i32::try_from(answer.return_value).unwrap_or_default() {
            0 => Ok(Found::Listener),
            error if error == Errno::NOENT.raw_os_error() => Ok(Found::Nobody),
            error if error == Errno::NODEV.raw_os_error() => Ok(Found::Device),
            error if error == Errno::OPNOTSUPP.raw_os_error() || error == NOT_SUPPORTED => {
                Ok(Found::Mptcp)
            }
            error => {
                Err(unavailable("steers to the listener", &io::Error::from_raw_os_error(error)))
            }
        }
    }
}

/// Returns a program of the object.
fn program<'a, T>(programs: &'a mut Ebpf, name: &str) -> Result<&'a mut T, Unavailable>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(ProgramError::NotLoaded);
    program.and_then(TryInto::try_into).map_err(|error| unavailable("takes a program", &error))
}

/// Makes the maps, with our own addresses in them.
fn load_object(listen: &[SocketAddr]) -> Result<Ebpf, Unavailable> {
    let mut addresses = [[0_u32; 4]; ADDRESSES_MAX];
    if listen.len() > ADDRESSES_MAX {
        let count = listen.len();
        let why = format!(
            "the proxy listens at {count} addresses, and steering takes {ADDRESSES_MAX} at most"
        );
        return Err(Unavailable { why });
    }
    for (words, own) in addresses.iter_mut().zip(listen) {
        let bytes = match own.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u32::from_ne_bytes(*bytes);
        }
    }
    let is_any = |any: IpAddr| u32::from(listen.iter().any(|own| own.ip() == any));
    let any_ipv6 = is_any(Ipv6Addr::UNSPECIFIED.into());
    let any_ipv4 = any_ipv6 | is_any(Ipv4Addr::UNSPECIFIED.into());
    let port = listen.first().map_or(0, |own| u32::from(own.port()));
    let count = u32::try_from(listen.len()).unwrap_or_default();
    EbpfLoader::new()
        .btf(None)
        .override_global("port", &port, true)
        .override_global("count", &count, true)
        .override_global("any_ipv4", &any_ipv4, true)
        .override_global("any_ipv6", &any_ipv6, true)
        .override_global("addresses", &addresses, true)
        .load(include_bytes_aligned!("steer.bpf.o"))
        .map_err(|error| unavailable("makes the maps", &error))
}

/// Returns the address that a dial to `server` reaches.
fn dialled(server: SocketAddr) -> SocketAddr {
    let ip = match server.ip().to_canonical() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, server.port())
}

/// Returns whether this host has the address: to its own addresses, the kernel sends from the same. A listener at a wildcard
/// would be found for each other host, too.
fn is_local(server: SocketAddr) -> bool {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(server)?;
        socket.local_addr()
    };
    server.ip().is_loopback() || source().is_ok_and(|source: SocketAddr| source.ip() == server.ip())
}

/// Returns a packet with the question for a slot. The source's port differs by slot, so that members of a group are found.
fn question(slot: u32, server: SocketAddr) -> Vec<u8> {
    let mut tuple = match server.ip() {
        IpAddr::V4(ip) => [Ipv4Addr::LOCALHOST.octets(), ip.octets()].concat(),
        IpAddr::V6(ip) => [Ipv6Addr::LOCALHOST.octets(), ip.octets()].concat(),
    };
    // No client has so low a port.
    let source = u16::try_from(slot + 1).unwrap_or_default();
    tuple.extend([source.to_be_bytes(), server.port().to_be_bytes()].concat());
    let size = u32::try_from(tuple.len()).unwrap_or_default();
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend([slot.to_ne_bytes(), size.to_ne_bytes()].concat());
    packet.extend(tuple);
    packet.resize(PACKET_BYTES, 0);
    packet
}

fn no_barrier() -> Unavailable {
    Unavailable {
        why: "the kernel refuses membarrier, without which a pause cannot be exact: it must not run with nohz_full".to_owned(),
    }
}

/// Returns the sentence for an error of the step that `does`.
fn unavailable(does: &str, error: &(dyn Error + 'static)) -> Unavailable {
    // The text may have the verifier's log in it.
    log::debug!("the step that {does}: {error}");
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    let system = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
    let why = match system.and_then(Errno::from_io_error) {
        Some(Errno::PERM) => "the system refuses BPF: the process needs CAP_BPF and CAP_NET_ADMIN, and a filter of system calls has to let bpf pass".to_owned(),
        Some(Errno::TOOBIG) => "this network namespace has 64 programs already that choose sockets".to_owned(),
        Some(Errno::NOSYS | Errno::INVAL) => format!("the kernel refuses the step that {does}: steering needs Linux 5.11 or newer, with BPF"),
        _ => format!("the step that {does} fails: {}", system.map_or_else(|| error.to_string(), ToString::to_string)),
    };
    Unavailable { why }
}

#[cfg(test)]
mod tests;
