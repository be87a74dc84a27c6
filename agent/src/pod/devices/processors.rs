//! The guest's processors: how many of those that the machine has are online.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::DeviceError;

const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Brings the first `count` processors online and takes the others offline; returns how many are online.
pub fn set_online(count: u32) -> Result<u32, DeviceError> {
    set_online_in(Path::new(DIRECTORY), count)
}

/// How many processors are online.
pub fn count_online() -> Result<u32, DeviceError> {
    let processors = processors(Path::new(DIRECTORY)).map_err(DeviceError::Processors)?;
    count_online_of(&processors)
}

fn set_online_in(directory: &Path, count: u32) -> Result<u32, DeviceError> {
    let mut processors = processors(directory).map_err(DeviceError::Processors)?;
    for processor in &processors {
        if processor.number < count {
            processor.switch(true)?;
        }
    }
    processors.reverse();
    for processor in &processors {
        if processor.number >= count.max(1) {
            processor.switch(false)?;
        }
    }
    count_online_of(&processors)
}

fn count_online_of(processors: &[Processor]) -> Result<u32, DeviceError> {
    let mut online = 0;
    for processor in processors {
        online += u32::from(processor.is_online()?);
    }
    Ok(online)
}

/// One processor that the machine may have.
struct Processor {
    number: u32,
    /// Its file "online". The first processor does not have one, because it is always online.
    switch: PathBuf,
}

impl Processor {
    fn is_online(&self) -> Result<bool, DeviceError> {
        match fs::read_to_string(&self.switch) {
            Ok(state) => Ok(state.trim() == "1"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(source) => Err(self.error("tell whether it is online", source)),
        }
    }

    fn switch(&self, on: bool) -> Result<(), DeviceError> {
        if self.is_online()? == on {
            return Ok(());
        }
        let (value, what) = if on { ("1", "bring it online") } else { ("0", "take it offline") };
        fs::write(&self.switch, value).map_err(|source| self.error(what, source))
    }

    fn error(&self, what: &'static str, source: io::Error) -> DeviceError {
        DeviceError::Processor { number: self.number, what, source }
    }
}

/// The processors, sorted by their numbers.
fn processors(directory: &Path) -> io::Result<Vec<Processor>> {
    let mut processors = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("cpu")?.parse().ok());
        if let Some(number) = number {
            processors.push(Processor { number, switch: entry.path().join("online") });
        }
    }
    processors.sort_by_key(|processor| processor.number);
    Ok(processors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest_with(states: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in ["cpu0", "cpufreq", "cpuidle"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        for (number, state) in (1..).zip(states) {
            let cpu = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&cpu).unwrap();
            fs::write(cpu.join("online"), format!("{state}\n")).unwrap();
        }
        directory
    }

    fn states(directory: &Path) -> Vec<String> {
        let processors = processors(directory).unwrap();
        processors[1..].iter().map(|cpu| fs::read_to_string(&cpu.switch).unwrap().trim().to_owned()).collect()
    }

    #[test]
    fn the_first_processors_are_online_and_the_others_are_not() {
        let guest = guest_with(&["0", "0", "1"]);
        assert_eq!(set_online_in(guest.path(), 3).unwrap(), 3);
        assert_eq!(states(guest.path()), ["1", "1", "0"]);
        assert_eq!(set_online_in(guest.path(), 1).unwrap(), 1);
        assert_eq!(states(guest.path()), ["0", "0", "0"]);
    }

    #[test]
    fn the_first_processor_stays_and_more_than_there_are_is_all() {
        let guest = guest_with(&["1"]);
        assert_eq!(set_online_in(guest.path(), 0).unwrap(), 1);
        assert_eq!(set_online_in(guest.path(), 9).unwrap(), 2);
    }
}
