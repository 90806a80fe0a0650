//! The programs under test: their start in front of an upstream, and their CPU time and memory.

use std::{
    env, fmt, fs,
    io::{self, Write as _},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::load::{self, Address};

/// Longest time that a program may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(3);
/// Unit of the times in `/proc/PID/stat` (`USER_HZ`, a hundredth of a second on every Linux port in use).
pub(crate) const TICK: Duration = Duration::from_millis(10);

/// Variable with the path of another build of tcpause, which is measured beside this one.
const BASELINE: &str = "TCPAUSE_BASELINE";

/// A program between a client and an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Direct,
    /// Tcpause that steers: no byte passes it.
    Steered,
    Tcpause,
    /// Build of tcpause that [`BASELINE`] names, to show the cost of a change.
    Baseline,
    HaproxySplicing,
    Haproxy,
    Nginx,
    Socat,
    SocketProxyd,
}

/// A kind of address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp,
    Unix,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Unix => "UNIX",
        })
    }
}

/// Running program, which ends when this is dropped.
pub(crate) struct Running {
    child: Option<Child>,
    /// Address that clients connect to.
    pub(crate) front: Address,
}

impl Program {
    pub(crate) const ALL: [Self; 9] = [
        Self::Direct,
        Self::Steered,
        Self::Tcpause,
        Self::Baseline,
        Self::HaproxySplicing,
        Self::Haproxy,
        Self::Nginx,
        Self::Socat,
        Self::SocketProxyd,
    ];

    /// Returns the heading of its column.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Steered => "steered",
            Self::Tcpause => "tcpause",
            Self::Baseline => "baseline",
            Self::HaproxySplicing => "haproxy splicing",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx stream",
            Self::Socat => "socat",
            Self::SocketProxyd => "socket-proxyd",
        }
    }

    /// Returns the version as the program prints it; `None` if it is not on this machine.
    pub(crate) fn version(self) -> Option<String> {
        let (file, argument) = match self {
            Self::Direct => return Some("no proxy".into()),
            Self::Tcpause | Self::Steered | Self::Baseline => (self.tcpause()?, "--version"),
            Self::HaproxySplicing | Self::Haproxy => (find("haproxy")?, "-v"),
            Self::Nginx if Path::new(NGINX_MODULE).exists() => (find("nginx")?, "-v"),
            Self::Nginx => return None,
            Self::Socat => (find("socat")?, "-V"),
            Self::SocketProxyd => {
                find("systemd-socket-activate")?;
                (find("systemd-socket-proxyd")?, "--version")
            }
        };
        let output = Command::new(file).arg(argument).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.lines()
            .find(|line| line.contains(|letter: char| letter.is_ascii_digit()))
            .map(Into::into)
    }

    /// Returns true if it can do what it is measured for between such addresses.
    pub(crate) fn is_for(self, front: Kind, back: Kind) -> bool {
        self != Self::Steered || (front, back) == (Kind::Tcp, Kind::Tcp)
    }

    /// Starts it with one worker, in front of `upstream`, with its files in `dir`.
    pub(crate) fn start(self, front: Kind, upstream: &Address, dir: &Path) -> io::Result<Running> {
        if self == Self::Direct {
            return Ok(Running { child: None, front: upstream.clone() });
        }
        let stem = format!("{self:?}-{front:?}-{}", kind_of(upstream));
        let front = match front {
            Kind::Tcp => Address::Tcp(TcpListener::bind("127.0.0.1:0")?.local_addr()?),
            Kind::Unix => Address::Unix(dir.join(format!("{stem}.sock"))),
        };
        if let Address::Unix(path) = &front {
            // The socket file of the round before goes, as not every program replaces it.
            fs::remove_file(path).ok();
        }
        let command = self.command(&front, upstream, &dir.join(&stem))?;
        let mut command = pinned(&command);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let running = Running { child: Some(child), front };
        let deadline = Instant::now() + START_TIMEOUT;
        let control = dir.join(&stem).with_extension("control");
        let is_ready = || match self {
            Self::Steered => is_steering(&control),
            _ => load::idle(&running.front, 1).is_ok(),
        };
        while !is_ready() {
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{} does not start", self.name())));
            }
            std::thread::sleep(TICK);
        }
        Ok(running)
    }

    /// Returns the binary of tcpause; for the baseline, the one that [`BASELINE`] names.
    fn tcpause(self) -> Option<PathBuf> {
        match self {
            Self::Baseline => env::var_os(BASELINE).map(PathBuf::from),
            _ => Some(PathBuf::from(env!("CARGO_BIN_EXE_tcpause"))),
        }
    }

    fn command(self, front: &Address, upstream: &Address, stem: &Path) -> io::Result<Command> {
        let plain = |address: &Address, unix: &str| match address {
            Address::Tcp(address) => address.to_string(),
            Address::Unix(path) => format!("{unix}{}", path.display()),
        };
        let config = stem.with_extension("conf");
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let command = match self {
            Self::Direct => return Err(missing()),
            Self::Tcpause | Self::Steered | Self::Baseline => {
                let mut command = Command::new(self.tcpause().ok_or_else(missing)?);
                fs::write(&config, "")?;
                command.arg("--config").arg(&config).args([
                    "--proxy-threads",
                    "1",
                    "--log-level",
                    "warn",
                ]);
                command.args([
                    "--proxy-addr",
                    &plain(front, "unix://"),
                    "--upstream-addr",
                    &plain(upstream, "unix://"),
                ]);
                command
                    .arg("--control-addr")
                    .arg(format!("unix://{}", stem.with_extension("control").display()));
                if self == Self::Steered {
                    command.args(["--upstream-steer", "on"]);
                }
                command
            }
            Self::HaproxySplicing | Self::Haproxy => {
                let splice = "option splice-request\n option splice-response\n";
                let splice = if self == Self::Haproxy { "" } else { splice };
                let text = format!(
                    "global\n nbthread 1\n maxconn 4500\ndefaults\n mode tcp\n {splice} timeout connect 5s\n \
                     timeout client 1h\n timeout server 1h\nlisten it\n bind {}\n server it {}\n",
                    plain(front, "unix@"),
                    plain(upstream, "unix@")
                );
                fs::write(&config, text)?;
                let mut command = Command::new(find("haproxy").ok_or_else(missing)?);
                command.arg("-db").arg("-f").arg(&config);
                command
            }
            Self::Nginx => {
                let text = format!(
                    "load_module {NGINX_MODULE};\nworker_processes 1;\nworker_rlimit_nofile 20000;\ndaemon off;\n\
                     user {};\npid {};\nevents {{ worker_connections 19000; }}\n\
                     stream {{ server {{ listen {}; proxy_pass {}; proxy_timeout 1h; }} }}\n",
                    // Its worker must be allowed to reach the sockets in our directory.
                    env::var("USER").unwrap_or_else(|_| "root".into()),
                    stem.with_extension("pid").display(),
                    plain(front, "unix:"),
                    plain(upstream, "unix:")
                );
                fs::write(&config, text)?;
                let mut command = Command::new(find("nginx").ok_or_else(missing)?);
                command.arg("-c").arg(&config).arg("-e").arg(stem.with_extension("log"));
                command
            }
            Self::Socat => {
                let mut command = Command::new(find("socat").ok_or_else(missing)?);
                command.arg(match front {
                    Address::Tcp(address) => {
                        format!(
                            "TCP-LISTEN:{},bind={},reuseaddr,fork,nodelay,backlog=4096",
                            address.port(),
                            address.ip()
                        )
                    }
                    Address::Unix(path) => {
                        format!("UNIX-LISTEN:{},fork,backlog=4096", path.display())
                    }
                });
                command.arg(match upstream {
                    Address::Tcp(address) => format!("TCP:{address},nodelay"),
                    Address::Unix(path) => format!("UNIX-CONNECT:{}", path.display()),
                });
                command
            }
            Self::SocketProxyd => {
                let mut command =
                    Command::new(find("systemd-socket-activate").ok_or_else(missing)?);
                command
                    .args(["-l", &plain(front, "")])
                    .arg(find("systemd-socket-proxyd").ok_or_else(missing)?);
                command.args(["--connections-max=9000", &plain(upstream, "")]);
                command
            }
        };
        Ok(command)
    }
}

impl Running {
    /// Returns the CPU time of the program and its children, dead ones included.
    pub(crate) fn cpu(&self) -> Duration {
        let processes = self.processes();
        let living: u64 = processes.iter().map(|process| nanoseconds(process.pid)).sum();
        let dead: u32 = processes.iter().map(|process| process.ticks_of_dead_children).sum();
        Duration::from_nanos(living) + TICK * dead
    }

    /// Returns the resident memory of the program and its children, in KiB.
    pub(crate) fn resident(&self) -> u64 {
        let resident = |process: &Process| {
            let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid)).ok()?;
            let line = text.lines().find(|line| line.starts_with("Pss:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        self.processes().iter().filter_map(resident).sum()
    }

    /// Returns the program and its children.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let Some(child) = &self.child else { return Vec::new() };
        let all = processes();
        let mut ours = vec![child.id()];
        let mut index = 0;
        while index < ours.len() {
            let parent = ours[index];
            ours.extend(
                all.iter().filter(|process| process.parent == parent).map(|process| process.pid),
            );
            index += 1;
        }
        all.into_iter().filter(|process| ours.contains(&process.pid)).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let processes = self.processes();
        if let Some(child) = &mut self.child {
            // Parents are killed first, or an nginx master would replace a killed worker.
            for process in &processes {
                if let Some(pid) =
                    i32::try_from(process.pid).ok().and_then(rustix::process::Pid::from_raw)
                {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
                }
            }
            child.wait().ok();
        }
    }
}

/// Returns all processes of the machine.
pub(crate) fn processes() -> Vec<Process> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| Process::read(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// Line of `/proc/PID/stat` (`proc_pid_stat(5)`).
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    /// CPU time of its threads, dead ones included.
    pub(crate) ticks: u32,
    pub(crate) ticks_of_dead_children: u32,
}

impl Process {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name may contain anything. The first field after it is the third.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u32>().ok();
        Some(Self {
            pid,
            parent: field(4)?,
            ticks: field(14)? + field(15)?,
            ticks_of_dead_children: field(16)? + field(17)?,
        })
    }
}

/// Returns the CPU time of all threads of a process. It is not read from `/proc/PID/stat`, which counts hundredths of a second.
fn nanoseconds(pid: u32) -> u64 {
    let thread = |entry: io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(entry.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(thread).sum()
}

/// Processor that programs run on. It is fixed, as the cost of a wake-up depends more on the scheduler's choice than on them.
pub(crate) const PROGRAMS: &str = "1";
/// Processor that the load runs on, unless a row shares one with the program.
pub(crate) const LOAD: &str = "0";

/// Moves this process and its threads to a processor.
pub(crate) fn pin_load(processor: &str) {
    let pid = std::process::id().to_string();
    let done =
        Command::new("taskset").args(["-acp", processor, &pid]).stdout(Stdio::null()).status();
    if !done.is_ok_and(|status| status.success()) {
        println!("taskset does not work here: the figures vary with the scheduler's choices");
    }
}

/// Returns the same command, run on the processor of the programs.
fn pinned(command: &Command) -> Command {
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", PROGRAMS]).arg(command.get_program()).args(command.get_args());
    pinned
}

/// Returns true if the tcpause with this control socket steers new connections.
fn is_steering(control: &Path) -> bool {
    let ask = || {
        let mut control = UnixStream::connect(control)?;
        control.write_all(b"GET /status HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        io::read_to_string(control)
    };
    ask().is_ok_and(|status: String| status.contains("\"state\":\"steering\""))
}

const NGINX_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Returns the path of an executable.
fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/lib/systemd", "/usr/lib/systemd"].map(PathBuf::from);
    env::split_paths(&path).chain(more).map(|dir| dir.join(name)).find(|file| file.is_file())
}

fn kind_of(address: &Address) -> &'static str {
    match address {
        Address::Tcp(_) => "tcp",
        Address::Unix(_) => "unix",
    }
}
