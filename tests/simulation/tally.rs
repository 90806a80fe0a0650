//! The tally of a schedule, or of many.

/// The events of a schedule.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    pub clients: u64,
    pub carried: u64,
    pub bytes: u64,
    pub spliced: u64,
    pub resets: u64,
    pub shortages: u64,
    pub panics: u64,
    pub hand_overs: u64,
    pub switches: u64,
    pub fences: u64,
    pub turns: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.clients += more.clients;
        self.carried += more.carried;
        self.bytes += more.bytes;
        self.spliced += more.spliced;
        self.resets += more.resets;
        self.shortages += more.shortages;
        self.panics += more.panics;
        self.hand_overs += more.hand_overs;
        self.switches += more.switches;
        self.fences += more.fences;
        self.turns += more.turns;
    }
}
