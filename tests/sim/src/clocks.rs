//! Wall clocks of the hosts, and what depends on them: when nodes may join, and by which tokens. Nothing else does.

use mesh_core::api::NewToken;
use mesh_core::node::Input;
use mesh_core::time::Time;
use mesh_keys::{Admission, JoinMode, JoinToken, JoinWindow, Signed, Token, TokenId};

use crate::host::Host;
use crate::model::SECRET;
use crate::world::World;

/// Steps of a clock, in seconds: what a time server corrects, a time zone, a clock that began at zero.
const STEPS: [i64; 8] = [-1, 2, -61, 75, 3_600, -7_200, 315_360_000, -1_000_000_000];

/// How long tokens and open doors last at most, in seconds.
const LASTS: usize = 60;

/// What the wall clock of a process shows: what it was told, and the time since.
pub(crate) fn shown(host: &Host, now: Time) -> Option<u64> {
    let (told, at) = host.process.as_ref()?.wall?;
    Some(told.saturating_add(now.since(at).as_secs()))
}

/// Why `host` should not have signed this admission now, by its own clock and by what it knows.
pub(crate) fn wrongly_admitted(host: &Host, signed: &Signed<Admission>, now: Time) -> Option<String> {
    let admission = signed.decode().ok()?;
    let view = host.node()?.view()?;
    if admission.sponsor.node_id() != host.id() {
        return None;
    }
    let clock = shown(host, now);
    let open = |end: u64| clock.is_some_and(|clock| clock < end);
    let who = admission.subject.node_id().short();
    match admission.mode {
        JoinMode::Token(id) => {
            let token = view.tokens().find(|token| token.id == id);
            let taken_back = view.to_delta().revocations.into_iter().any(|revocation| {
                revocation.check(&view.cluster()).is_ok_and(|revocation| revocation.id == id)
            });
            let used = view.token_uses(&id);
            let valid = |token: &Token| open(token.expires) && used <= token.uses as usize && !taken_back;
            let wrong = !token.is_some_and(valid);
            let state = format!("revoked: {taken_back}, used {used} times, at {clock:?}");
            wrong.then(|| format!("{who} came by a token that is not valid ({token:?}; {state})"))
        }
        JoinMode::KeyFile | JoinMode::Password | JoinMode::Other(_) => {
            let window = view.join_window();
            let may = match window {
                JoinWindow::Open => true,
                JoinWindow::Closed => false,
                JoinWindow::Until(end) => open(end),
            };
            (!may).then(|| format!("{who} was let in at {clock:?} while joining was {window:?}"))
        }
    }
}

impl World {
    /// What the wall clock of a host shows, in seconds since 1970.
    pub fn wall_clock(&self, at: usize) -> u64 {
        let right = self.settings.wall_clock + self.queue.now.since_origin().as_secs();
        right.saturating_add_signed(self.hosts[at].clock_error)
    }

    /// The daemon of a host looks at the wall clock.
    pub(crate) fn tell_wall_clock(&mut self, at: usize) {
        let (unix_seconds, now) = (self.wall_clock(at), self.queue.now);
        if let Some(process) = self.process(at) {
            process.wall = Some((unix_seconds, now));
            self.tell(at, Input::WallClock { unix_seconds });
        }
    }

    /// Somebody sets the wall clock of a host, whether its daemon runs or not.
    pub(crate) fn step_clock(&mut self, at: usize) {
        // Half of them of a host that is off, if there is one: the clock is another one when it starts.
        let off: Vec<usize> =
            self.hosts.iter().filter(|host| host.process.is_none()).map(|host| host.at).collect();
        let at = self.dice.pick(&off).filter(|_| self.dice.chance(5_000)).unwrap_or(at);
        let Some(step) = self.dice.pick(&STEPS) else { return };
        self.say(format!("host{at}: the wall clock is set by {step} s"));
        self.hosts[at].clock_error += step;
        self.tell_wall_clock(at);
    }

    /// The operator of a host decides when nodes may join.
    pub(crate) fn set_join_window(&mut self, at: usize) {
        let window = match self.dice.below(4) {
            0 => JoinWindow::Closed,
            1 => JoinWindow::Open,
            _ => JoinWindow::Until(self.wall_clock(at) + self.dice.below(LASTS) as u64),
        };
        self.say(format!("host{at}: joining is {window:?} from now on"));
        self.ask_join_window(at, window);
    }

    /// A host joins by a token that the operator of another one has made.
    pub(crate) fn join_by_token(&mut self, by: usize) {
        let Some(view) = self.view(by) else { return };
        let token = JoinToken::generate(&view.cluster(), self.dice.rng());
        let expires = self.wall_clock(by) + self.dice.below(LASTS) as u64;
        let new = NewToken { id: token.id, hash: token.hash(), expires, uses: 1 };
        let id: TokenId = token.id;
        let Some(at) = self.newcomer(SECRET) else { return };
        self.say(format!("host{by} makes a token, good for {LASTS} s at most; host{at} starts with it"));
        self.ask_token(by, new);
        if self.dice.chance(2_000) {
            self.ask_revocation(by, id);
        }
        self.hosts[at].token = Some(token);
        self.start(at);
        self.populate(at);
    }

    /// In the end whoever has not come in by its token gets the key file.
    pub(crate) fn give_key_files(&mut self) {
        for at in 0..self.hosts.len() {
            let member = self.hosts[at].node().is_none_or(|node| node.view().is_some());
            if self.hosts[at].token.is_some() && !member {
                self.say(format!("host{at} gets the key file"));
                self.kill(at);
                self.hosts[at].token = None;
                self.start(at);
            }
        }
    }

    /// In the end joining is open.
    pub(crate) fn open_the_doors(&mut self, by: usize) {
        let window = self.view(by).map(|view| view.join_window());
        if window.is_some_and(|window| window != JoinWindow::Open) {
            self.say(format!("host{by}: joining is open from now on"));
            self.ask_join_window(by, JoinWindow::Open);
        }
    }
}
