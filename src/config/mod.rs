//! The configuration: read from a file or set key by key, written, and checked.

pub(crate) mod address;
mod defaults;
pub(crate) mod duration;
mod fleet;
pub(crate) mod network;
pub mod settings;
pub mod suggest;
mod validate;
mod values;
mod yaml;

use std::{
    fmt,
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use self::settings::Setting;
pub use self::{
    fleet::{Endpoint, FleetConfig, FleetName, FleetPrefix, OnDisconnect, Username},
    settings::{
        Config, ControlConfig, HoldConfig, LogConfig, MonitorConfig, PauseConfig, ProxyConfig,
        ResumeConfig, TlsConfig, UpstreamConfig,
    },
    values::{
        ConnectionLog, GroupName, HalfClosed, LogFormat, Overflow, ProxySource, RejectWith,
        SendProxy, Steer,
    },
};
use crate::error::Error;

/// Size of the largest configuration file. A file with every key has some kibibytes, and a huge file costs the parser seconds.
const FILE_BYTES_MAX: usize = 1024 * 1024;

impl Config {
    /// Reads a YAML file. A key that it leaves out keeps its default. The error names the file, line, column and key, and the remedy.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let name = path.display();
        let mut bytes = Vec::new();
        // The read ends one byte beyond the bound, which is enough to see that the file is too large.
        let limit = FILE_BYTES_MAX as u64 + 1;
        if let Err(error) =
            File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
        {
            let remedy = match error.kind() {
                ErrorKind::NotFound => "check the path",
                ErrorKind::PermissionDenied => "let this user read it",
                ErrorKind::IsADirectory => "name a file",
                _ => "name a readable file",
            };
            return Err(Error::Config(format!(
                "{name}: cannot read the configuration: {error}; {remedy}"
            )));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text, &name.to_string()),
            Err(error) if error.as_bytes().len() > FILE_BYTES_MAX => Err(too_large(&name)),
            Err(error) => {
                let good = String::from_utf8_lossy(
                    error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default(),
                );
                let (line, column) = (
                    good.split('\n').count(),
                    good.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
                );
                Err(Error::Config(format!(
                    "{name}:{line}:{column}: this is not UTF-8; save the file as UTF-8"
                )))
            }
        }
    }

    /// Reads YAML. Errors call the file `name`.
    pub fn parse(text: &str, name: &str) -> Result<Self, Error> {
        if text.len() > FILE_BYTES_MAX {
            return Err(too_large(name));
        }
        yaml::parse(text).map_err(|error| Error::Config(format!("{name}:{error}")))
    }

    /// Returns the table of settings, in the order of the file.
    #[doc(hidden)]
    pub fn settings() -> &'static [Setting] {
        settings::SETTINGS
    }

    /// Returns every key, in the order of the file: `grace-period`, `log-level`, `proxy.addr` and so on.
    #[doc(hidden)]
    pub fn keys() -> impl Iterator<Item = &'static str> {
        settings::SETTINGS.iter().map(|setting| setting.key)
    }

    /// Sets one key from text, as an option of the command line does. The error does not name the key.
    #[doc(hidden)]
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), String> {
        let setting = settings::find(key).ok_or_else(|| format!("there is no key {key:?}"))?;
        setting.set(self, text)
    }

    /// Returns the value of one key, in the form that [`Config::set`] takes; `None` if it is not set or there is no such key.
    #[doc(hidden)]
    pub fn get(&self, key: &str) -> Option<String> {
        yaml::to_text(&settings::find(key)?.get(self))
    }

    /// Checks for settings that contradict each other.
    pub fn validate(&self) -> Result<(), Error> {
        validate::validate(self).map_err(Error::Config)
    }
}

fn too_large(name: impl fmt::Display) -> Error {
    Error::Config(format!(
        "{name}: the configuration is larger than {FILE_BYTES_MAX} bytes; is this the right file?"
    ))
}

/// Writes YAML that [`Config::parse`] reads as the same configuration.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&yaml::format(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests;
