//! No name leads out of the share.

use virtiofsd::fuse::{CreateIn, LinkIn, MkdirIn, MknodIn, Rename2In, RenameIn};

use super::*;

/// A request that gives a name.
struct NamingRequest {
    label: &'static str,
    opcode: Opcode,
    /// The file that it would change if the name were followed, relative to the share or to a directory like it.
    victim: &'static str,
    body: fn(&mut Guest, &[u8]) -> Vec<u8>,
}

/// Each operation that gives a name to a file, and each of its names.
fn naming_requests() -> Vec<NamingRequest> {
    let request = |label, opcode, victim, body| NamingRequest { label, opcode, victim, body };
    vec![
        request("look up", Opcode::Lookup, "file", |_, name| name.to_vec()),
        request("link symbolically", Opcode::Symlink, "new", |_, name| [name, b"target\0"].concat()),
        request("make a FIFO", Opcode::Mknod, "new", |_, name| {
            let node = MknodIn { mode: libc::S_IFIFO | 0o600, ..MknodIn::default() };
            [node.as_slice(), name].concat()
        }),
        request("make a directory", Opcode::Mkdir, "new", |_, name| {
            [MkdirIn { mode: 0o700, umask: 0 }.as_slice(), name].concat()
        }),
        request("unlink", Opcode::Unlink, "file", |_, name| name.to_vec()),
        request("remove a directory", Opcode::Rmdir, "empty", |_, name| name.to_vec()),
        request("rename from", Opcode::Rename, "file", |_, name| {
            [RenameIn { newdir: ROOT_ID }.as_slice(), name, b"moved\0"].concat()
        }),
        request("rename to", Opcode::Rename, "new", |_, name| {
            [RenameIn { newdir: ROOT_ID }.as_slice(), b"file\0", name].concat()
        }),
        request("rename from, with flags", Opcode::Rename2, "file", |_, name| {
            let rename = Rename2In { newdir: ROOT_ID, flags: libc::RENAME_NOREPLACE, padding: 0 };
            [rename.as_slice(), name, b"moved\0"].concat()
        }),
        request("rename to, with flags", Opcode::Rename2, "new", |_, name| {
            let rename = Rename2In { newdir: ROOT_ID, flags: libc::RENAME_NOREPLACE, padding: 0 };
            [rename.as_slice(), b"file\0", name].concat()
        }),
        request("link", Opcode::Link, "new", |guest, name| {
            [LinkIn { oldnodeid: guest.find("file") }.as_slice(), name].concat()
        }),
        request("create", Opcode::Create, "new", |_, name| {
            let flags = (libc::O_CREAT | libc::O_RDWR).cast_unsigned();
            [CreateIn { flags, mode: 0o600, ..CreateIn::default() }.as_slice(), name].concat()
        }),
    ]
}

/// Invalid names, each with the error number that the guest is sent.
fn bad_names(guest: &Guest, victim: &str) -> Vec<(Vec<u8>, i32)> {
    let absolute = guest.outside(victim);
    let inside = [victim.as_bytes(), &[0], victim.as_bytes(), &[0]].concat();
    let invalid = [
        string(absolute.to_str().unwrap()),
        string(&format!("../outside/{victim}")),
        string(&format!("directory/{victim}")),
        string(&format!("./{victim}")),
        string(&format!("{victim}/")),
        string(".."),
        string("."),
        string(""),
        inside,
    ];
    let mut bad: Vec<_> = invalid.into_iter().map(|name| (name, libc::EINVAL)).collect();
    bad.push((string(&"x".repeat(300)), libc::ENAMETOOLONG));
    bad
}

#[test]
fn a_name_that_could_lead_out_of_the_share_is_refused_by_every_request() {
    let mut guest = Guest::new();
    let before = manifest(guest.directory.path());
    for request in naming_requests() {
        for (name, expected) in bad_names(&guest, request.victim) {
            let shown = String::from_utf8_lossy(&name).into_owned();
            let body = (request.body)(&mut guest, &name);
            let reply = guest.ask(request.opcode, ROOT_ID, &body);
            assert_eq!(reply.error, expected, "{} {shown:?}", request.label);
            assert_eq!(manifest(guest.directory.path()), before, "{} {shown:?}", request.label);
        }
    }
}

#[test]
fn a_name_without_an_end_is_refused_by_every_request() {
    let mut guest = Guest::new();
    let before = manifest(guest.directory.path());
    for request in naming_requests() {
        let mut body = (request.body)(&mut guest, request.victim.as_bytes());
        if body.ends_with(&[0]) {
            body.pop();
        }
        assert_eq!(guest.ask(request.opcode, ROOT_ID, &body).error, libc::EINVAL, "{}", request.label);
        assert_eq!(manifest(guest.directory.path()), before, "{}", request.label);
    }
}

#[test]
fn every_request_does_what_it_says_with_a_good_name() {
    for request in naming_requests() {
        let mut guest = Guest::new();
        let body = (request.body)(&mut guest, &string(request.victim));
        assert_eq!(guest.ask(request.opcode, ROOT_ID, &body).error, 0, "{}", request.label);
        let there = guest.share(request.victim).symlink_metadata().is_ok();
        let taken =
            request.label.contains("from") || request.label.contains("remove") || request.label == "unlink";
        assert_eq!(there, !taken, "{}", request.label);
    }
}

#[test]
fn an_attribute_without_a_good_name_is_refused() {
    let mut guest = Guest::new();
    let file = guest.find("file");
    let long = string(&format!("user.{}", "x".repeat(300)));
    for (name, expected) in [(string(""), libc::EINVAL), (long, libc::ENAMETOOLONG)] {
        let set = [&1u32.to_le_bytes()[..], &[0; 12], &name, b"v"].concat();
        assert_eq!(guest.ask(Opcode::Setxattr, file, &set).error, expected);
        let get = [&8u32.to_le_bytes()[..], &[0; 4], &name].concat();
        assert_eq!(guest.ask(Opcode::Getxattr, file, &get).error, expected);
        assert_eq!(guest.ask(Opcode::Removexattr, file, &name).error, expected);
    }
}
