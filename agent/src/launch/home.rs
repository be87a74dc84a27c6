//! The home directory of a container's user, from the container's own `/etc/passwd`.
//!
//! libcontainer asks glibc for it (`getpwuid_r`) when `HOME` is not set. In the container's root, glibc loads whatever
//! library the image's `/etc/nsswitch.conf` names, into a process that is still the agent's. So libcontainer always
//! finds `HOME` set, and the file is read here.

use std::{
    fs::OpenOptions,
    io::{self, BufRead as _, BufReader, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use oci_spec::runtime::Process;

/// What `HOME` is until it has been looked up. A user who sets it to this has it looked up as well.
const TO_BE_LOOKED_UP: &str = "\u{1}to-be-looked-up";

/// Where the users of a container are.
const USERS: &str = "/etc/passwd";

/// How much of the file is read, in bytes. What follows is not looked at.
const USERS_MAX: u64 = 4 << 20;

/// The home of a user who is not in the file (runc: `libcontainer/init_linux.go`, `getUserHome`).
const DEFAULT: &str = "/";

/// Keeps libcontainer from looking the home up, if it is not set or empty.
pub fn leave_to_executor(process: &mut Process) {
    let mut environment = process.env().clone().unwrap_or_default();
    let home = environment.iter().rev().find_map(|variable| variable.strip_prefix("HOME="));
    if home.is_none_or(str::is_empty) {
        environment.push(format!("HOME={TO_BE_LOOKED_UP}"));
        process.set_env(Some(environment));
    }
}

/// Replaces a home that [`leave_to_executor`] has left open. Must be called in the container's root.
pub fn look_up(home: &mut String, uid: u32) {
    if home == TO_BE_LOOKED_UP {
        *home = find(Path::new(USERS), uid).ok().flatten().unwrap_or_else(|| DEFAULT.to_owned());
    }
}

/// The home of a user in a file as passwd(5) describes. What is not a regular file is not read, nor waited for.
fn find(users: &Path, uid: u32) -> io::Result<Option<String>> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(users)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for line in BufReader::new(file.take(USERS_MAX)).split(b'\n') {
        let line = line?;
        let Ok(line) = std::str::from_utf8(&line) else { continue };
        let mut fields = line.split(':').skip(2);
        if fields.next().and_then(|field| field.parse().ok()) == Some(uid) {
            return Ok(fields.nth(2).filter(|home| !home.is_empty()).map(str::to_owned));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_users_home_is_found_by_the_id() {
        let directory = tempfile::tempdir().unwrap();
        let users = directory.path().join("passwd");
        let content = b"# a comment\n\nroot:x:0:0:root:/root:/bin/sh\n\xff:x:7:7::/bytes:\nshort:x:8\n\
            none:x:9:9:::\nalice:x:1000:1000:Alice,,,:/home/alice:/bin/sh\nother:x:1000:1:::\nlast:x:11:1::/last";
        fs::write(&users, content).unwrap();
        let home = |uid| find(&users, uid).unwrap();
        assert_eq!(home(0).as_deref(), Some("/root"));
        assert_eq!(home(1000).as_deref(), Some("/home/alice"));
        assert_eq!(home(11).as_deref(), Some("/last"));
        assert_eq!([7, 8, 9, 10].map(home), [const { None }; 4]);
        assert!(find(directory.path(), 0).is_err());
        assert!(find(&directory.path().join("missing"), 0).is_err());
    }

    #[test]
    fn no_more_of_a_file_is_read_than_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let users = directory.path().join("passwd");
        let file = fs::File::create(&users).unwrap();
        file.set_len(USERS_MAX).unwrap();
        std::io::Write::write_all(
            &mut OpenOptions::new().append(true).open(&users).unwrap(),
            b"\nlate:x:5:5::/late:\n",
        )
        .unwrap();
        assert_eq!(find(&users, 5).unwrap(), None);
    }

    #[test]
    fn only_a_home_that_is_not_set_is_looked_up() {
        let set = |environment: &[&str]| {
            let mut process = Process::default();
            process.set_env(Some(environment.iter().map(|variable| (*variable).to_owned()).collect()));
            leave_to_executor(&mut process);
            process.env().clone().unwrap_or_default().last().cloned().unwrap_or_default()
        };
        let open = format!("HOME={TO_BE_LOOKED_UP}");
        assert_eq!(set(&[]), open);
        assert_eq!(set(&["HOME=/a", "HOME="]), open);
        assert_eq!(set(&["HOME=", "HOME=/a"]), "HOME=/a");
        let mut home = "/a".to_owned();
        look_up(&mut home, 0);
        assert_eq!(home, "/a");
        TO_BE_LOOKED_UP.clone_into(&mut home);
        look_up(&mut home, u32::MAX);
        assert_eq!(home, DEFAULT);
    }
}
