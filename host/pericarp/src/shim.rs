//! What containerd asks of the program that it takes for a runtime's shim: `containerd-shim-pericarp-v1` is a link to
//! this one. No shim runs: `-info` is a question with one answer, `delete` ends a container that containerd has given
//! up.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Read as _, Write as _},
    iter,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use pericarp_controller::{ALLOWED_MOUNT_TYPES, Deleted, config::Config};
use pericarp_protos::{
    containerd::types::{RuntimeInfo, RuntimeVersion},
    id::{ContainerId, SandboxId},
};
use prost::Message as _;
use prost_types::{Any, Timestamp};
use serde_json::{Value, json};

/// How containerd derives the program's name from a runtime's: `io.containerd.pericarp.v1`.
pub const PROGRAM: &str = "containerd-shim-pericarp-v1";

/// containerd's name for the features that the OCI runtime spec describes (`client/client.go`); their value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The annotation in which a runtime tells containerd 2.2 and later which mounts of a container's root file system it
/// does itself, separated by commas and without spaces (`core/runtime/v2/task_manager.go`, `allowedMounts`). Without it
/// containerd would mount every image layer of the erofs snapshotter on the host, for nobody.
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// The most that is read of the options, which containerd sends along and gets back.
const OPTIONS_MAX: u64 = 1 << 20;

/// The mount options that a container may have (`libcontainer`'s, and those that the controller deals with itself).
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnosuid",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rslave",
    "rstrictatime",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
];

/// Whether this program was called by the shim's name.
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.and_then(|program| Path::new(program).file_name()) == Some(OsStr::new(PROGRAM))
}

/// Answers containerd. `config` is the controller's configuration.
pub fn run(arguments: impl Iterator<Item = OsString>, config: &Path) -> anyhow::Result<()> {
    let arguments: Vec<_> = arguments.collect();
    let answer = if arguments.first().is_some_and(|first| first == "-info") {
        let mut options = Vec::new();
        io::stdin().take(OPTIONS_MAX).read_to_end(&mut options).context("cannot read the options")?;
        info(&options).context("the options are not an Any")?.encode_to_vec()
    } else if arguments.last().is_some_and(|last| last == "delete") {
        delete(&arguments, config)?.encode_to_vec()
    } else {
        bail!(
            "{PROGRAM} is no shim and answers -info and delete only: its pods are the controller's, `pericarp serve`"
        );
    };
    io::stdout().write_all(&answer).context("cannot write the answer")
}

/// containerd's answer to `delete`: `containerd.runtime.task.v2.DeleteResponse` (`api/runtime/task/v2/shim.proto`).
#[derive(Clone, PartialEq, prost::Message)]
struct DeleteResponse {
    #[prost(uint32, tag = "1")]
    pid: u32,
    #[prost(uint32, tag = "2")]
    exit_status: u32,
    #[prost(message, optional, tag = "3")]
    exited_at: Option<Timestamp>,
}

fn delete(arguments: &[OsString], config: &Path) -> anyhow::Result<DeleteResponse> {
    let id = value_of(arguments, "-id").and_then(OsStr::to_str).context("delete without an -id")?;
    let id: ContainerId = id.parse()?;
    let bundle = PathBuf::from(value_of(arguments, "-bundle").context("delete without a -bundle")?);
    // containerd writes it before the task is made (`ShimManager.Start`).
    let sandbox = bundle.join("sandbox");
    let sandbox = fs::read_to_string(&sandbox)
        .with_context(|| format!("cannot read {}: no pod is known for {id}", sandbox.display()))?;
    let sandbox: SandboxId = sandbox.try_into()?;
    let config = Config::load(config, true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Deleted { exit_status, exited_at } =
        runtime.block_on(pericarp_controller::delete(&config, &sandbox, &id));
    Ok(DeleteResponse { pid: 0, exit_status, exited_at: Some(exited_at.into()) })
}

/// The value of a flag: containerd gives each two words.
fn value_of<'a>(arguments: &'a [OsString], flag: &str) -> Option<&'a OsStr> {
    let words = arguments.windows(2).find(|words| words[0] == flag)?;
    Some(&words[1])
}

fn info(options: &[u8]) -> Result<RuntimeInfo, prost::DecodeError> {
    let options = if options.is_empty() { None } else { Some(Any::decode(options)?) };
    let features = Any { type_url: FEATURES.to_owned(), value: features().to_string().into_bytes() };
    Ok(RuntimeInfo {
        name: "io.containerd.pericarp.v1".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }),
        options,
        features: Some(features),
        annotations: iter::once((ALLOWED_MOUNTS.to_owned(), ALLOWED_MOUNT_TYPES.join(","))).collect(),
    })
}

/// What a container can have, in the form that the OCI runtime spec gives it (`features.md`).
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": false },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_learns_what_containers_can_have_and_gets_its_options_back() {
        let options = Any { type_url: "x".into(), value: vec![1, 2] };
        let answer = info(&options.encode_to_vec()).unwrap();
        assert_eq!(answer.options, Some(options));
        let features = answer.features.unwrap();
        assert_eq!(features.type_url, FEATURES);
        let features: Value = serde_json::from_slice(&features.value).unwrap();
        assert!(features["mountOptions"].as_array().unwrap().contains(&"rro".into()));
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&"user".into()));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert_eq!(info(b"").unwrap().options, None);
        assert!(info(b"\xff").is_err());
    }

    /// The reader of an answer in containerd 2.2 and later (`ShimManager.loadShimInfo`).
    fn handled_mounts(answer: &RuntimeInfo) -> Vec<&str> {
        answer
            .annotations
            .get("containerd.io/runtime-allow-mounts")
            .map_or(vec![], |value| value.split(',').collect())
    }

    #[test]
    fn containerd_learns_which_mounts_it_is_not_to_make() {
        // It asks without options about root file systems, and with the configuration's about features.
        let options = Any { type_url: "x".into(), value: vec![] };
        for asked in [vec![], options.encode_to_vec()] {
            let answer = info(&asked).unwrap();
            assert_eq!(
                handled_mounts(&answer),
                ["erofs", "format/bind", "format/overlay", "format/mkdir/overlay"],
            );
            assert_eq!(answer.annotations.len(), 1, "{:?}", answer.annotations);
        }
    }

    #[test]
    fn containerd_learns_the_runtimes_name_and_version() {
        let answer = RuntimeInfo::decode(&*info(b"").unwrap().encode_to_vec()).unwrap();
        assert_eq!(answer.name, "io.containerd.pericarp.v1");
        assert_eq!(answer.version.unwrap().version, env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn only_the_shims_name_makes_a_shim() {
        assert!(is_called(Some(OsStr::new("/usr/bin/containerd-shim-pericarp-v1"))));
        assert!(!is_called(Some(OsStr::new("/usr/bin/pericarp"))));
        assert!(!is_called(None));
    }

    #[test]
    fn any_other_question_is_refused() {
        for arguments in [vec![], vec!["start"], vec!["-namespace", "k8s.io", "-id", "x", "start"]] {
            let error = run(arguments.into_iter().map(OsString::from), Path::new("/none")).unwrap_err();
            assert!(error.to_string().contains("pericarp serve"), "{error}");
        }
    }

    fn delete_with(bundle: &Path, config: &Path) -> anyhow::Result<DeleteResponse> {
        let words = ["-namespace", "k8s.io", "-id", "c1", "-bundle"].map(OsString::from);
        let words: Vec<_> = words.into_iter().chain([bundle.into(), "delete".into()]).collect();
        delete(&words, config)
    }

    #[test]
    fn a_container_whose_machine_is_gone_is_told_as_killed() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.toml");
        fs::write(&config, format!("run_dir = '{}'", directory.path().display())).unwrap();
        let error = delete_with(directory.path(), &config).unwrap_err();
        assert!(error.to_string().contains("no pod is known for c1"), "{error}");
        fs::write(directory.path().join("sandbox"), "../elsewhere").unwrap();
        delete_with(directory.path(), &config).unwrap_err();
        fs::write(directory.path().join("sandbox"), "0123abc").unwrap();
        let answer = delete_with(directory.path(), &config).unwrap();
        assert_eq!(answer.exit_status, 137);
        assert!(answer.exited_at.is_some());
    }
}
