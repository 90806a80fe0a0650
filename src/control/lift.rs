//! The end of pauses by a caller of the API. Those of the fleet stay, unless the caller forces it.

use super::{command::Caller, query::Resume, response::Response};
use crate::{handle::Handle, pause::fleet::Protected};

/// Ends pauses, or releases some of the held clients.
pub(super) fn resume(wanted: &Resume, caller: &Caller, handle: &Handle) -> Response {
    let (pauses, by) = (handle.pauses(), &caller.name);
    let name = match wanted {
        Resume::Lift { name, force: true } => {
            pauses.force(name.as_deref(), by);
            return Response::empty(204);
        }
        Resume::Lift { name, force: false } => name.as_deref(),
        Resume::Release(count) => {
            return match pauses.release(*count, by) {
                Some(released) => Response::json(format!("{{\"released\": {released}}}\n")),
                None => Response::error(409, "It is not paused: there is nobody to let through."),
            };
        }
    };
    pauses.lift(name, by);
    match pauses.protected(name).as_slice() {
        [] => Response::empty(204),
        staying => refuse_lift(staying),
    }
}

/// Returns the answer to an order to lift pauses that only the fleet ends.
fn refuse_lift(staying: &[Protected]) -> Response {
    let by = |Protected { name, by }: &Protected| format!("{name} by {by}");
    let text = format!(
        "The fleet's pauses stay: {}. DELETE /fleet/paused (tcpause resume --fleet) lifts one on all hosts, and force=yes (--force) on this host alone.",
        staying.iter().map(by).collect::<Vec<_>>().join(", ")
    );
    let answer = serde_json::json!({ "error": text, "status": 409, "pauses": staying });
    Response { status: 409, ..Response::json(format!("{answer}\n")) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::{command::Command, index::Scope, metrics::Source, request::Request},
        *,
    };

    #[test]
    fn the_pauses_of_the_fleet_end_by_force_alone() {
        let handle = super::super::tests::handle();
        let caller = Caller { name: "a test".to_owned(), request_id: 1 };
        let ask = |method: &str, target: &str| {
            let metrics = Source::new();
            let request = Request {
                method: method.to_owned(),
                target: target.to_owned(),
                accepts_html: false,
            };
            let command = Command::parse(&request, Scope::Full).unwrap();
            let answer = command.execute(&caller, &handle, None, &metrics);
            answer.map_or((201, String::new()), |answer| (answer.status, answer.body))
        };
        let (status, body) = ask("PUT", "/paused?name=fleet/a");
        assert!(status == 400 && body.contains("write another") && !handle.is_paused(), "{body}");
        assert_eq!(ask("PUT", "/paused").0, 201);
        handle.pauses().put_lost();
        for target in ["/paused", "/paused?name=fleet/lost"] {
            let (status, body) = ask("DELETE", target);
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!((status, body["status"].as_u64()), (409, Some(409)));
            let staying = serde_json::json!([{ "name": "fleet/lost", "by": "the fleet" }]);
            assert_eq!(body["pauses"], staying, "{body}");
            assert!(body["error"].as_str().unwrap().contains("fleet/lost by the fleet. "));
        }
        assert!(!handle.pauses().lock().holds_name("default"), "all others are lifted");
        assert_eq!(ask("DELETE", "/paused?name=other").0, 204);
        assert!(!handle.resume() && handle.is_paused(), "the program has no force");
        assert_eq!(ask("DELETE", "/paused?force=yes").0, 204);
        assert!(!handle.is_paused());
        assert_eq!(ask("DELETE", "/paused").0, 204);
    }

    #[test]
    fn force_raises_a_fence_that_has_come_down_and_no_other() {
        let handle = super::super::tests::handle();
        let caller = Caller { name: "a test".to_owned(), request_id: 1 };
        let force = |name: Option<&str>| {
            let name = name.map(str::to_owned);
            resume(&Resume::Lift { name, force: true }, &caller, &handle)
        };
        let gate = &handle.pauses().gate;
        let hour = Duration::from_secs(3600);
        handle.pauses().fence_at(Some(crate::sys::boot::boot_time() + hour));
        force(None);
        assert!(gate.fence().is_some(), "it has not come");
        handle.pauses().fence_at(Some(Duration::ZERO));
        force(Some("fleet/deploy"));
        assert!(gate.enter().is_none());
        force(Some("fleet/lost"));
        assert!(gate.enter().is_some() && gate.fence().is_none());
    }
}
