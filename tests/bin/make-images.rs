//! Makes the images of the tests as one OCI archive, because nothing is pulled: `make-images BUSYBOX PEER
//! ARCHIVE`.
//!
//! `localhost/pericarp/busybox:1` has layers that a run-time can get wrong: owners, modes, links, extended attributes,
//! whiteouts; and `peer`, the tests' own program. `localhost/pericarp/busybox-usr1:1` is the same with another stop
//! signal. `localhost/pericarp/pause:1` is what runc's pods are made of; Pericarp needs none.

use std::{
    env,
    fs::{self, File},
    io::Write,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [busybox, peer, archive] = &arguments[..] else { bail!("usage: make-images BUSYBOX PEER ARCHIVE") };
    let binary = fs::read(busybox).with_context(|| format!("read {busybox}"))?;
    let peer = fs::read(peer).with_context(|| format!("read {peer}"))?;
    let mut out = Archive::create(archive)?;
    let base = out.layer(&base_layer(busybox, &binary, &peer)?)?;
    let odd = out.layer(&odd_layer()?)?;
    let whiteouts = out.layer(&whiteout_layer()?)?;
    let layers = [&base, &odd, &whiteouts];
    let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "FROM_IMAGE=yes"];
    let mut config = json!({"Env": environment, "Cmd": ["sh"], "WorkingDir": "/"});
    out.image("localhost/pericarp/busybox:1", &layers, &config)?;
    config["StopSignal"] = "SIGUSR1".into();
    out.image("localhost/pericarp/busybox-usr1:1", &layers, &config)?;
    let pause = out.layer(&pause_layer(&binary)?)?;
    out.image("localhost/pericarp/pause:1", &[&pause], &json!({"Entrypoint": ["/bin/sleep", "infinity"]}))?;
    out.finish()
}

/// A layer's tar file, made from entries that all have a name, a mode and an owner.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn entry(
        &mut self,
        kind: EntryType,
        path: &str,
        mode: u32,
        owner: (u64, u64),
        content: &[u8],
    ) -> Result<()> {
        let mut header = Self::header(kind, mode, owner);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).with_context(|| format!("add {path}"))
    }

    fn header(kind: EntryType, mode: u32, (uid, gid): (u64, u64)) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(1_700_000_000);
        header.set_size(0);
        header
    }

    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(EntryType::Directory, path, mode, (0, 0), b"")
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(EntryType::Regular, path, mode, (0, 0), content)
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = Self::header(EntryType::Symlink, 0o777, (0, 0));
        self.0.append_link(&mut header, path, target).with_context(|| format!("link {path}"))
    }

    fn finish(self) -> Result<Vec<u8>> {
        Ok(self.0.into_inner()?)
    }
}

fn base_layer(busybox: &str, binary: &[u8], peer: &[u8]) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    for directory in
        ["bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var", "var/empty"]
    {
        layer.directory(directory, 0o755)?;
    }
    layer.directory("tmp", 0o1777)?;
    layer.file("bin/busybox", 0o755, binary)?;
    layer.file("bin/peer", 0o755, peer)?;
    let listed =
        Command::new(busybox).arg("--list").output().with_context(|| format!("run {busybox} --list"))?;
    ensure!(listed.status.success(), "{busybox} --list: {}", listed.status);
    for applet in String::from_utf8(listed.stdout)?.lines().filter(|applet| *applet != "busybox") {
        layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nalice:x:1000:\nshared:x:2000:alice\n")?;
    layer.file("etc/replaced", 0o644, b"from the first layer\n")?;
    layer.file("etc/removed", 0o644, b"from the first layer\n")?;
    layer.directory("var/emptied", 0o755)?;
    layer.file("var/emptied/old", 0o644, b"old\n")?;
    layer.finish()
}

fn odd_layer() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.directory("odd", 0o755)?;
    layer.entry(EntryType::Regular, "odd/owned", 0o640, (1000, 2000), b"alice's\n")?;
    layer.entry(EntryType::Regular, "odd/high-owner", 0o600, (65_533, 65_532), b"nearly nobody's\n")?;
    layer.file("odd/setuid", 0o4755, b"#!/bin/sh\nid -u\n")?;
    layer.file("odd/unreadable", 0, b"root only\n")?;
    layer.directory("odd/sticky", 0o3777)?;
    layer.file("odd/name with spaces and \u{fc}", 0o644, b"named\n")?;
    // A hard link carries mode and owner again.
    let mut header = Layer::header(EntryType::Link, 0o640, (1000, 2000));
    layer.0.append_link(&mut header, "odd/hard-link", "odd/owned")?;
    layer.symlink("odd/dangling", "/nowhere")?;
    layer.entry(EntryType::Fifo, "odd/fifo", 0o600, (0, 0), b"")?;
    layer.0.append_pax_extensions([("SCHILY.xattr.user.pericarp", b"kept".as_slice())])?;
    layer.file("odd/attributed", 0o644, b"has an extended attribute\n")?;
    layer.file("etc/replaced", 0o600, b"from the second layer\n")?;
    layer.directory("home/alice", 0o755)?;
    layer.finish()
}

fn whiteout_layer() -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.file("etc/.wh.removed", 0o644, b"")?;
    layer.directory("var/emptied", 0o755)?;
    layer.file("var/emptied/.wh..wh..opq", 0o644, b"")?;
    layer.file("var/emptied/new", 0o644, b"new\n")?;
    layer.finish()
}

fn pause_layer(binary: &[u8]) -> Result<Vec<u8>> {
    let mut layer = Layer::new();
    layer.directory("bin", 0o755)?;
    layer.file("bin/busybox", 0o755, binary)?;
    layer.symlink("bin/sleep", "busybox")?;
    layer.finish()
}

/// An OCI image layout, packed.
struct Archive {
    tar: Builder<File>,
    manifests: Vec<Value>,
}

impl Archive {
    fn create(path: &str) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("create {path}"))?;
        let mut archive = Self { tar: Builder::new(file), manifests: Vec::new() };
        archive.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(archive)
    }

    fn add(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let mut header = Layer::header(EntryType::Regular, 0o644, (0, 0));
        header.set_size(content.len() as u64);
        Ok(self.tar.append_data(&mut header, path, content)?)
    }

    /// Adds a blob and returns its descriptor.
    fn blob(&mut self, media_type: &str, content: &[u8]) -> Result<Value> {
        let digest: Vec<String> = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = digest.concat();
        self.add(&format!("blobs/sha256/{digest}"), content)?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len()}))
    }

    /// Not compressed: the node unpacks it on an emulated CPU.
    fn layer(&mut self, content: &[u8]) -> Result<Value> {
        self.blob("application/vnd.oci.image.layer.v1.tar", content)
    }

    fn image(&mut self, name: &str, layers: &[&Value], config: &Value) -> Result<()> {
        let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        let mut descriptor = self.blob(media_type, &serde_json::to_vec(&manifest)?)?;
        descriptor["annotations"] = json!({"io.containerd.image.name": name});
        self.manifests.push(descriptor);
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        self.add("index.json", &serde_json::to_vec(&index)?)?;
        self.tar.into_inner()?.flush()?;
        Ok(())
    }
}
