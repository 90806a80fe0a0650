//! Body of a control request: checked and counted as it comes, and thrown away. No request of the API needs one.

use serde::{Deserialize, Serialize};

use super::request::HttpError;

/// Longest body, including the framing of its chunks.
pub(super) const BODY_BYTES_MAX: usize = 16 << 10;

const TOO_LONG: HttpError = (413, "The body is too long: no request of this API needs one.");

/// Body on its way in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Body {
    /// `Content-Length`: this number of bytes is still to come.
    Sized(usize),
    /// `Transfer-Encoding: chunked`.
    Chunked(Chunks),
}

impl Body {
    /// Begins a body whose length is told beforehand.
    pub(super) fn sized(length: usize) -> Result<Self, HttpError> {
        if length > BODY_BYTES_MAX { Err(TOO_LONG) } else { Ok(Self::Sized(length)) }
    }

    /// Begins a body in chunks.
    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunks { place: Place::Size, size: 0, bytes: 0 })
    }

    /// Returns true once all of it has come.
    pub(super) fn is_whole(&self) -> bool {
        match self {
            Self::Sized(left) => *left == 0,
            Self::Chunked(chunks) => chunks.place == Place::End,
        }
    }

    /// Takes the next bytes; further ones behind the body are ignored.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<(), HttpError> {
        match self {
            Self::Sized(left) => *left = left.saturating_sub(bytes.len()),
            Self::Chunked(chunks) => {
                for &byte in bytes {
                    if chunks.place == Place::End {
                        break;
                    }
                    chunks.take(byte)?;
                }
            }
        }
        Ok(())
    }
}

/// Body in chunks, read to the letter of RFC 9112 (7.1): two readings of one body would be a way in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chunks {
    place: Place,
    /// Bytes of this chunk that are still to come.
    size: usize,
    /// All bytes so far.
    bytes: usize,
}

/// Place of the next byte in the chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Place {
    /// The first digit of a size.
    Size,
    /// Another digit of it, or its end.
    Digits,
    /// The text of a chunk extension.
    Extension,
    /// LF behind a size.
    SizeEnd,
    Data,
    /// CR behind the data.
    DataCr,
    /// LF behind the data.
    DataLf,
    /// The first byte of a trailer, or the CR of the empty line at the end.
    Trailer,
    Name,
    Value,
    /// LF behind a trailer.
    TrailerEnd,
    /// LF of the empty line.
    LastLf,
    /// Behind the last byte.
    End,
}

impl Chunks {
    fn take(&mut self, byte: u8) -> Result<(), HttpError> {
        self.bytes += 1;
        let is_text = byte == b'\t' || !byte.is_ascii_control();
        self.place = match (self.place, byte) {
            (Place::Size | Place::Digits, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                self.size = self.size * 16 + digit as usize;
                Place::Digits
            }
            (Place::Digits, b';') => Place::Extension,
            (Place::Extension, _) if is_text => Place::Extension,
            (Place::Digits | Place::Extension, b'\r') => Place::SizeEnd,
            (Place::SizeEnd, b'\n') if self.size == 0 => Place::Trailer,
            (Place::SizeEnd, b'\n') => Place::Data,
            (Place::Data, _) => {
                self.size -= 1;
                if self.size == 0 { Place::DataCr } else { Place::Data }
            }
            (Place::DataCr, b'\r') => Place::DataLf,
            (Place::DataLf, b'\n') => Place::Size,
            (Place::Trailer, b'\r') => Place::LastLf,
            (Place::LastLf, b'\n') => Place::End,
            (Place::Trailer | Place::Name, _) if is_token(byte) => Place::Name,
            (Place::Name, b':') => Place::Value,
            (Place::Value, _) if is_text => Place::Value,
            (Place::Value, b'\r') => Place::TrailerEnd,
            (Place::TrailerEnd, b'\n') => Place::Trailer,
            _ => return Err((400, "The chunks of the body are malformed: leave the body away.")),
        };
        // A size that will never fit is refused before its bytes come.
        if self.bytes + self.size > BODY_BYTES_MAX { Err(TOO_LONG) } else { Ok(()) }
    }
}

/// Returns true if `byte` may stand in the name of a header (RFC 9110, 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how many bytes a whole body takes, or the status that refuses it; the same, however the bytes come.
    fn read(bytes: &[u8]) -> Result<Option<usize>, u16> {
        let mut at_once = Body::chunked();
        let taken = at_once.take(bytes).map_err(|(status, _)| status);
        let mut body = Body::chunked();
        for (index, byte) in bytes.iter().enumerate() {
            if let Err((status, _)) = body.take(&[*byte]) {
                assert_eq!(taken, Err(status));
                return Err(status);
            }
            if body.is_whole() {
                assert!(taken.is_ok() && at_once.is_whole());
                return Ok(Some(index + 1));
            }
        }
        assert!(taken.is_ok() && !at_once.is_whole());
        Ok(None)
    }

    #[test]
    fn chunks_are_read_to_the_letter() {
        for whole in [
            "0\r\n\r\n",
            "000\r\n\r\n",
            "2\r\n{}\r\n0\r\n\r\n",
            "1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
            "a\r\n0123456789\r\n0\r\n\r\n",
            "A\r\n0\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n",
            "2;a=b;c=\"d e\"\r\n{}\r\n0;last\r\n\r\n",
            "0\r\nA: b\r\nContent-Length:\t7\r\n\r\n",
        ] {
            assert_eq!(read(whole.as_bytes()), Ok(Some(whole.len())), "{whole:?}");
            let pipelined = format!("{whole}PUT /paused HTTP/1.1\r\n");
            assert_eq!(read(pipelined.as_bytes()), Ok(Some(whole.len())), "{pipelined:?}");
            for end in 0..whole.len() {
                assert_eq!(read(&whole.as_bytes()[..end]), Ok(None), "{:?}", &whole[..end]);
            }
        }
        for malformed in [
            "\r\n",
            "\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            "g\r\n",
            " 1\r\n",
            "1 \r\n",
            "1\n",
            "1\rX",
            "1;a\n",
            "1;a\0\r\n",
            ";a\r\n",
            "1\r\n{}",
            "1\r\n{\n",
            "2\r\n{}0\r\n\r\n",
            "0\n",
            "0\r\n\n",
            "0\r\n\rX",
            "0\r\nA\r\n",
            "0\r\nA : b\r\n",
            "0\r\n A: b\r\n",
            "0\r\nA: b\n",
            "0\r\nA: b\0\r\n",
            "0\r\n: b\r\n",
        ] {
            assert_eq!(read(malformed.as_bytes()), Err(400), "{malformed:?}");
        }
    }

    #[test]
    fn chunks_have_a_bound() {
        let chunk = |size: usize| format!("{size:x}\r\n{}\r\n0\r\n\r\n", "x".repeat(size));
        let framing = "3ff3\r\n".len() + "\r\n0\r\n\r\n".len();
        let most = chunk(BODY_BYTES_MAX - framing);
        assert_eq!(read(most.as_bytes()), Ok(Some(BODY_BYTES_MAX)));
        assert_eq!(read(chunk(BODY_BYTES_MAX - framing + 1).as_bytes()), Err(413));
        for (begin, again) in
            [("", "0"), ("1;", "a"), ("", "1\r\n{\r\n"), ("0\r\nA:", "b"), ("0\r\n", "A: b\r\n")]
        {
            let bytes = format!("{begin}{}", again.repeat(BODY_BYTES_MAX + 1));
            assert_eq!(read(bytes.as_bytes()), Err(413), "{begin:?} and {again:?} without end");
        }
        for size in ["4001", "ffffffffffffffff", "10000000000000000", "fffffffffffffffffffffffff"] {
            assert_eq!(read(size.as_bytes()), Err(413), "{size}");
        }
    }
}
