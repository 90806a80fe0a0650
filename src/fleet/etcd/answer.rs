//! Answers as they come: what HTTP tells, and the problem in a body.

use serde::Deserialize;
use serde_json::Value;

/// Answer of an endpoint.
#[derive(Debug)]
pub(super) struct HttpAnswer {
    pub(super) status: u16,
    /// Target of a redirect.
    pub(super) location: Option<String>,
    pub(super) body: Vec<u8>,
    /// Number of the connection if it was made for this request.
    pub(super) connection: Option<u64>,
}

/// Problem, as versions of the gateway tell it.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct Problem {
    pub(super) message: String,
    code: u64,
    grpc_code: u64,
    /// A text, or the problem itself.
    error: Value,
}

impl Problem {
    pub(super) fn code(&self) -> u64 {
        self.code.max(self.grpc_code)
    }
}

/// Reads the problem that an answer tells: its code in gRPC, and a text.
pub(super) fn decode_problem(body: &[u8]) -> Option<(u64, String)> {
    let problem: Problem = serde_json::from_slice(body).ok()?;
    let inner =
        problem.error.as_object().and_then(|_| serde_json::from_value(problem.error.clone()).ok());
    let problem: Problem = inner.unwrap_or(problem);
    (!problem.message.is_empty()).then(|| (problem.code(), problem.message))
}
