//! The threads of the fleet, as in `src/fleet/threads`: one drives the member of a host, and one all of its coordinators.
//! Each takes one step after the other, and asks by a client of its own, for one machine at a time.

use std::collections::BTreeSet;

use crate::{
    fleet::{
        clock::BootTime,
        keys::KeySpace,
        step::{Doing, Step},
        store::{Answer, Operation, Reply, Request, StoreError},
    },
    world::{Event, MILLI, Message, Micros, SECOND, World, micros},
};

/// Most requests of a machine within a second: more are a loop that nothing slows down.
const REQUESTS_MAX: u32 = 150;

/// A thread, by the machine that it drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThreadId {
    Member(usize),
    Coordinator(usize),
}

/// Client of the store, of one thread.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Client {
    pub(crate) endpoint: usize,
    pub(crate) connection: u64,
}

/// Place of one machine in its thread.
#[derive(Debug, Default)]
pub(crate) struct Thread {
    /// Number of the step: news of older ones are void.
    pub(crate) token: u64,
    pub(crate) doing: Option<Doing>,
    is_waiting: bool,
    is_asking: bool,
    /// True if it is to be polled behind the answer to another coordinator of its host.
    is_blocked: bool,
    is_woken: bool,
    /// True if the state of its process was in the store when its request was carried out.
    pub(crate) has_state: bool,
    /// Requests within one second, and its begin.
    requests: (Micros, u32),
}

impl World {
    pub(crate) fn host_of(&self, thread: ThreadId) -> usize {
        match thread {
            ThreadId::Member(host) => host,
            ThreadId::Coordinator(command) => self.commands[command].host,
        }
    }

    pub(crate) fn thread(&mut self, thread: ThreadId) -> &mut Thread {
        match thread {
            ThreadId::Member(host) => &mut self.hosts[host].thread,
            ThreadId::Coordinator(command) => &mut self.commands[command].thread,
        }
    }

    pub(crate) fn client(&mut self, thread: ThreadId) -> &mut Client {
        let number = self.host_of(thread);
        &mut self.hosts[number].clients[usize::from(matches!(thread, ThreadId::Coordinator(_)))]
    }

    /// Has a thread poll its machine next.
    pub(crate) fn go_to_poll(&mut self, id: ThreadId, after: Micros) {
        let thread = self.thread(id);
        thread.token += 1;
        (thread.is_waiting, thread.is_asking, thread.doing) = (false, false, None);
        let token = thread.token;
        self.after(after, Event::Poll(id, token));
    }

    /// Goes on with the next step, at once or a moment later.
    fn go_on_with(&mut self, id: ThreadId) {
        let pause = self.moment(2 * MILLI);
        self.stop_at_times(id);
        self.go_to_poll(id, pause);
    }

    fn stop_at_times(&mut self, id: ThreadId) {
        if self.random.below(2_000_u32) < self.weather.stops && !self.is_healed {
            let host = self.host_of(id);
            self.stop_process(host);
        }
    }

    /// Wakes a thread that waits; another looks before it polls.
    pub(crate) fn wake(&mut self, id: ThreadId) {
        let thread = self.thread(id);
        thread.is_woken = true;
        if thread.is_waiting {
            self.go_to_poll(id, 0);
        }
    }

    /// Has a thread that waits poll, as its machine got an order.
    pub(crate) fn nudge(&mut self, id: ThreadId) {
        if self.thread(id).is_waiting {
            self.go_to_poll(id, 0);
        }
    }

    pub(crate) fn poll_thread(&mut self, id: ThreadId, token: u64) {
        if self.thread(id).token != token {
            return;
        }
        self.thread(id).is_waiting = false;
        if let ThreadId::Coordinator(command) = id {
            let host = self.commands[command].host;
            if self.commands.iter().any(|other| other.host == host && other.thread.is_asking) {
                self.commands[command].thread.is_blocked = true;
                return;
            }
            self.pass_wishes(command);
        }
        self.count_step(id);
        let is_woken = std::mem::take(&mut self.thread(id).is_woken);
        let number = self.host_of(id);
        let local = self.hosts[number].local(self.now);
        let step = match id {
            ThreadId::Member(_) => {
                let host = &mut self.hosts[number];
                let Some(member) = &mut host.member else { return };
                if is_woken {
                    member.woken();
                }
                member.poll(local, &host.proxy.view())
            }
            ThreadId::Coordinator(command) => {
                let Some(coordinator) = &mut self.commands[command].coordinator else { return };
                if is_woken {
                    coordinator.woken();
                }
                coordinator.poll(local)
            }
        };
        self.tell(|| {
            format!("{id:?}: {}", format!("{step:?}").chars().take(90).collect::<String>())
        });
        match step {
            Step::Ask(request, timeout) => self.ask(id, local, request, micros(timeout)),
            Step::Do(doing) => {
                // It can stand still between the decision and the deed.
                let pause = self.moment(MILLI);
                self.stop_at_times(id);
                let thread = self.thread(id);
                thread.token += 1;
                thread.doing = Some(doing);
                let token = thread.token;
                self.after(pause, Event::Do(id, token));
            }
            Step::Wait(at) => {
                let wait = self.hosts[number].real(at).saturating_sub(self.now);
                self.go_to_poll(id, wait);
                self.thread(id).is_waiting = true;
            }
            Step::Over => self.is_over(id),
        }
        match id {
            ThreadId::Coordinator(command) => self.look_at_phase(command),
            ThreadId::Member(number) => self.look_at_session(number),
        }
    }

    /// Takes note of a member that has joined, and has nothing left to do.
    fn look_at_session(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        let has_session = host.member.as_ref().is_some_and(|member| member.has_session());
        if has_session && host.thread.doing.is_none() {
            let key = format!("/t/f/member/{}", host.name);
            host.is_hole = false;
            host.is_unknown &= !self.etcd.keys.contains_key(&key);
        }
    }

    fn is_over(&mut self, id: ThreadId) {
        match id {
            ThreadId::Member(host) => {
                self.tell(|| format!("h{host} has left"));
                self.end_process(host);
                if self.is_healed || self.random.below(2) == 0 {
                    let after = self.random.below(10 * SECOND);
                    self.after(after, Event::Start(host));
                }
            }
            ThreadId::Coordinator(command) => {
                self.look_at_phase(command);
                self.commands[command].coordinator = None;
            }
        }
    }

    pub(crate) fn carry_out(&mut self, id: ThreadId, token: u64) {
        let number = self.host_of(id);
        let Some(doing) = self.thread(id).doing.clone().filter(|_| self.thread(id).token == token)
        else {
            return;
        };
        self.tell(|| format!("h{number} {doing:?}"));
        self.judge_doing(number, &doing);
        let local = self.hosts[number].local(self.now);
        let host = &mut self.hosts[number];
        host.proxy.carry_out(&doing, local, host.keep_for);
        let barrier = host.proxy.turns.iter().max().map_or(0, |&at| at.saturating_sub(self.now));
        let takes = match &doing {
            Doing::Pause { .. } | Doing::Lose => barrier,
            _ => 0,
        };
        self.after_deed(number, &doing);
        let more = self.moment(MILLI);
        self.after(takes + more, Event::Done(id, token));
        self.client_tries(number);
    }

    pub(crate) fn thread_has_done(&mut self, id: ThreadId, token: u64) {
        if self.thread(id).token != token {
            return;
        }
        let number = self.host_of(id);
        let local = self.hosts[number].local(self.now);
        if let Some(member) = &mut self.hosts[number].member {
            member.done(local);
        }
        self.go_on_with(id);
    }

    fn ask(&mut self, id: ThreadId, sent: BootTime, request: Request, timeout: Micros) {
        let number = self.host_of(id);
        let timeout = match id {
            ThreadId::Member(_) => {
                self.judge_request(number, &request);
                timeout
            }
            // A caller is told of the loss of its pause in time, whichever is asked for.
            ThreadId::Coordinator(_) => {
                let of_host = self.commands.iter().filter(|command| command.host == number);
                let losses = of_host.filter_map(|it| Some(it.coordinator.as_ref()?.lost_at()));
                let left = losses.filter(|at| *at > sent).map(|at| micros(at - sent)).min();
                timeout.min(left.unwrap_or(timeout))
            }
        };
        let now = self.now;
        let thread = self.thread(id);
        let (begin, count) = thread.requests;
        thread.requests = if now < begin + SECOND { (begin, count + 1) } else { (now, 1) };
        assert!(thread.requests.1 < REQUESTS_MAX, "{id:?} asks without a pause");
        thread.token += 1;
        thread.is_asking = true;
        let token = thread.token;
        let error = Err(StoreError::TimedOut("no answer in time".to_owned()));
        self.after(timeout + 1, Event::Answer(id, token, sent, error));
        let Client { endpoint, connection } = *self.client(id);
        let asked_at = self.now;
        let message = Message {
            thread: id,
            token,
            sent,
            asked_at,
            endpoint,
            connection,
            request,
            is_copy: false,
        };
        if self.now < self.hosts[number].cut_until {
            // Some networks refuse at once.
            if self.random.below(3) == 0 {
                let error = Err(StoreError::Unreachable("refused".to_owned()));
                self.after(MILLI, Event::Answer(id, token, sent, error));
            }
            return;
        }
        if self.random.below(1_000_u32) < self.weather.lost {
            return;
        }
        if self.random.below(1_000_u32) < self.weather.doubled {
            let late = self.random.below(10 * SECOND);
            let copy = Message { is_copy: true, ..message.clone() };
            self.after(late, Event::Arrive(Box::new(copy)));
        }
        let is_late = self.random.below(1_000_u32) < self.weather.late;
        let delay =
            if is_late { self.random.below(10 * SECOND) } else { self.random.below(4 * MILLI) };
        self.after(delay + 200, Event::Arrive(Box::new(message)));
    }

    /// Has the store carry a request out.
    pub(crate) fn arrive(&mut self, message: Box<Message>) {
        let is_stalled = self.now < self.weather.stalled_until[message.endpoint]
            || self.weather.stalled.contains(&message.connection);
        if is_stalled && !message.is_copy {
            // It renews what the others have ended, or does not know what they have granted, and agrees on nothing.
            if let Request::KeepAlive { .. } = message.request {
                self.weather.stalled.insert(message.connection);
                let is_known = self.random.below(3) > 0;
                let ttl = is_known.then_some(std::time::Duration::from_secs(5));
                let reply = self.etcd.reply(message.connection, Answer::Renewed { ttl });
                self.reply(&message, Ok(reply));
            }
            return;
        }
        if self.now < self.weather.leaderless_until {
            let left = self.weather.leaderless_until - self.now;
            if self.now + left < message.asked_at + 17 * SECOND {
                self.after(left + MILLI, Event::Arrive(message));
            }
            return;
        }
        let number = self.host_of(message.thread);
        let result = match self.refusal(number, &message.request) {
            Some(error) => Err(error),
            None => {
                let before = self.etcd.deleted.len();
                // A connection can break behind it, and the next endpoint is asked for the same.
                if !message.is_copy && self.random.below(1_000_u32) < self.weather.doubled {
                    self.etcd.ask(self.now, &message.request, message.connection).ok();
                }
                let result = self.etcd.ask(self.now, &message.request, message.connection);
                if self.etcd.deleted.len() > before {
                    self.judge_deletion(message.thread);
                }
                result
            }
        };
        if let ThreadId::Member(number) = message.thread
            && !message.is_copy
        {
            self.hosts[number].thread.has_state = self.has_state(number);
        }
        self.tell(|| {
            let text = format!("{:?}", message.request);
            let kind: String = text.chars().take(400).collect();
            let succeeded = match &result {
                Ok(Reply { answer: Answer::Transacted { succeeded, .. }, .. }) => *succeeded,
                result => result.is_ok(),
            };
            format!("etcd: {:?} copy {} {succeeded} {kind}", message.thread, message.is_copy)
        });
        if !message.is_copy {
            self.reply(&message, result);
        }
    }

    /// Returns the refusal of a request for want of rights or room.
    fn refusal(&self, host: usize, request: &Request) -> Option<StoreError> {
        let is_full = self.now < self.weather.full_until;
        let Request::Transact(request) = request else {
            let grants = matches!(request, Request::Grant { .. });
            return (is_full && grants).then(|| StoreError::Full("no space".to_owned()));
        };
        let operations = request.then.iter().chain(&request.otherwise);
        let pauses = KeySpace::new("/t", "f").pauses();
        for operation in operations {
            let (key, puts) = match operation {
                Operation::Put { key, .. } => (key, true),
                Operation::Delete { key } => (key, false),
                Operation::Range { .. } => continue,
            };
            if self.hosts[host].is_denied && key.starts_with(&pauses) {
                return Some(StoreError::Denied("permission denied".to_owned()));
            }
            if is_full && puts {
                return Some(StoreError::Full("no space".to_owned()));
            }
        }
        None
    }

    fn reply(&mut self, message: &Message, result: Result<Reply, StoreError>) {
        if self.random.below(1_000_u32) < self.weather.lost {
            return;
        }
        let host = &self.hosts[self.host_of(message.thread)];
        if self.now < host.cut_until {
            return;
        }
        let is_late = self.random.below(1_000_u32) < self.weather.late;
        let delay =
            if is_late { self.random.below(3 * SECOND) } else { self.random.below(4 * MILLI) };
        let event = Event::Answer(message.thread, message.token, message.sent, result);
        self.after(delay + 200, event);
    }

    pub(crate) fn thread_is_answered(
        &mut self,
        id: ThreadId,
        token: u64,
        sent: BootTime,
        result: Result<Reply, StoreError>,
    ) {
        if self.thread(id).token != token {
            return;
        }
        let number = self.host_of(id);
        let has_failed =
            matches!(result, Err(StoreError::TimedOut(_) | StoreError::Unreachable(_)));
        if has_failed {
            let connection = self.new_connection();
            let client = self.client(id);
            *client = Client { endpoint: (client.endpoint + 1) % 3, connection };
        }
        let now = self.hosts[number].local(self.now);
        match id {
            ThreadId::Member(_) => {
                self.note_contact(number, sent, &result);
                if let Some(member) = &mut self.hosts[number].member {
                    member.answered(sent, now, result);
                }
            }
            ThreadId::Coordinator(command) => {
                // A store that is full takes no holder either.
                if has_failed || matches!(result, Err(StoreError::Full(_))) {
                    self.commands[command].troubled_at = self.now;
                }
                if let Some(coordinator) = &mut self.commands[command].coordinator {
                    coordinator.answered(sent, now, result);
                }
            }
        }
        self.go_on_with(id);
        if let ThreadId::Coordinator(command) = id {
            self.look_at_phase(command);
            self.unblock(number);
        }
    }

    /// Has the coordinators of a host go on that have waited for the answer to another one.
    fn unblock(&mut self, host: usize) {
        for number in 0..self.commands.len() {
            let command = &mut self.commands[number];
            if command.host == host && std::mem::take(&mut command.thread.is_blocked) {
                self.go_to_poll(ThreadId::Coordinator(number), 0);
            }
        }
    }

    /// Ends the process of a host, with all that is in it.
    pub(crate) fn end_process(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        host.member = None;
        host.thread.token += 1;
        host.generation += 1;
        host.stopped_until = 0;
        host.proxy = crate::proxy::Proxy::default();
        host.proxy.is_draining = true;
        host.forced_ids = BTreeSet::new();
        host.ids.clear();
        for command in &mut self.commands {
            if command.host == number {
                command.coordinator = None;
                command.thread = Thread { token: command.thread.token + 1, ..Thread::default() };
            }
        }
    }
}
