//! Every control of a container's spec, each with what a container sees that has it and what one sees that has not. A
//! control that does nothing fails its row.
//!
//! All rows run in three containers of one pod, and in three under runc, which must see the same. The user
//! namespace is a control of the whole pod (`user_namespaces.rs`), and a process's limits and ambient capabilities
//! cannot be asked for over CRI, so they have a test of their own below.

use std::{fmt::Write as _, fs, os::unix::fs::PermissionsExt as _};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use pericarp_tests::{
    ContainerBuilder, Pod, Runtime, api, direct::machine::DirectMachine, on_pericarp, without_containerd,
};
use serde_json::json;

/// A control: a script that tries it, and what the script prints in each container.
struct Row {
    control: &'static str,
    script: &'static str,
    /// In a privileged container: nothing is asked for, and everything is allowed.
    open: &'static str,
    /// In a container whose first process is root, with every control that there is for root.
    walled: &'static str,
    /// In a container whose first process is an ordinary user's.
    user: &'static str,
    /// Whether the script prints this under runc too.
    like_runc: bool,
}

const fn row(control: &'static str, script: &'static str, [open, walled, user]: [&'static str; 3]) -> Row {
    Row { control, script, open, walled, user, like_runc: true }
}

impl Row {
    /// Marks a row of the machine alone: under runc, the script shows what the node has.
    const fn of_machine(self) -> Self {
        Self { like_runc: false, ..self }
    }
}

/// A script that makes a node of a device, and prints whether it can be opened.
macro_rules! device {
    ($name:literal, $numbers:literal) => {
        concat!(
            "mknod /dev/my-",
            $name,
            " ",
            $numbers,
            " && { ( : < /dev/my-",
            $name,
            " ) 2>&1 || true; } | sed 's/.*: //'"
        )
    };
}

const REFUSED: &str = "Operation not permitted";

const ROWS: [Row; 22] = [
    row("seccomp is on", "sed -n 's/^Seccomp:\t//p' /proc/self/status", ["0", "2", "0"]),
    row(
        "seccomp stops a call with the error of its profile",
        "mkdir /dev/shm/made-$WHO 2>&1 | sed 's/.*: //'; rmdir /dev/shm/made-$WHO 2> /dev/null",
        ["", "No space left on device", ""],
    ),
    row(
        "capabilities: bounding",
        "sed -n 's/^CapBnd:\t//p' /proc/self/status",
        ["000001ffffffffff", "00000000a80425fa", "00000000a80425fb"],
    ),
    row(
        "capabilities: effective",
        "sed -n 's/^CapEff:\t//p' /proc/self/status",
        ["000001ffffffffff", "00000000a80425fa", "0000000000000000"],
    ),
    row(
        "a dropped capability is missed",
        "echo > /dev/shm/mine-$WHO; chown 7 /dev/shm/mine-$WHO 2>&1 | sed 's/.*: //'; rm -f /dev/shm/mine-$WHO",
        ["", REFUSED, REFUSED],
    ),
    row(
        "masked path",
        "[ -s /etc/passwd ] && echo readable || echo empty",
        ["readable", "empty", "readable"],
    ),
    row(
        "read-only path",
        "{ echo x > /proc/sys/kernel/domainname; } 2>/dev/null && echo written || echo refused",
        ["written", "refused", "refused"],
    ),
    row(
        "read-only root",
        "{ echo x > /tmp/new; } 2>/dev/null && echo written || echo refused",
        ["written", "refused", "written"],
    ),
    row("no new privileges", "sed -n 's/^NoNewPrivs:\t//p' /proc/self/status", ["0", "0", "1"]),
    row("user and group", "echo $(id -u) $(id -g)", ["0 0", "0 0", "1000 1000"]),
    row(
        "additional groups",
        "case \" $(id -G) \" in *' 4242 '*) echo in;; *) echo out;; esac",
        ["out", "out", "in"],
    ),
    row("memory limit", "cat $CGROUP/memory.max", ["max", "67108864", "max"]),
    row("CPU limit", "cat $CGROUP/cpu.max", ["max 100000", "50000 100000", "max 100000"]),
    row(
        "CPU share",
        "[ $(cat $CGROUP/cpu.weight) -lt 100 ] && echo small || echo usual",
        ["usual", "small", "usual"],
    ),
    row(
        "limit of processes",
        "[ $(cat $CGROUP/pids.max) = 64 ] && echo 64 || echo more",
        ["more", "64", "more"],
    ),
    row(
        "limit of huge pages",
        "[ $(cat $CGROUP/hugetlb.2MB.max) = 4194304 ] && echo 4 MiB || echo more",
        ["more", "4 MiB", "more"],
    )
    // The node's kernel may have no such pages.
    .of_machine(),
    row("devices: null", device!("null", "c 1 3"), ["", "", "mknod: /dev/my-null: Permission denied"]),
    row(
        "devices: kernel log",
        device!("kmsg", "c 1 11"),
        ["", REFUSED, "mknod: /dev/my-kmsg: Permission denied"],
    ),
    row(
        "devices: serial line",
        device!("serial", "c 4 64"),
        ["", REFUSED, "mknod: /dev/my-serial: Permission denied"],
    )
    .of_machine(),
    // runc's containers may use the node's console: containerd's rules say so.
    row(
        "devices: console",
        device!("console", "c 5 1"),
        ["", REFUSED, "mknod: /dev/my-console: Permission denied"],
    )
    .of_machine(),
    row(
        "devices: a disk",
        device!("disk", "b 254 0"),
        ["No such device or address", REFUSED, "mknod: /dev/my-disk: Permission denied"],
    )
    .of_machine(),
    row(
        "devices of a privileged container",
        "for name in fuse kmsg net/tun vsock; do [ -c /dev/$name ] && echo $name; done; true",
        ["fuse\nkmsg\nnet/tun\nvsock", "", ""],
    )
    .of_machine(),
];

fn open(container: ContainerBuilder) -> ContainerBuilder {
    container.with_security(|security| {
        security.privileged = true;
        security.seccomp = None;
        security.masked_paths.clear();
        security.readonly_paths.clear();
    })
}

fn walled(container: ContainerBuilder, profile: &str) -> ContainerBuilder {
    let resources = api::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        cpu_shares: 128,
        unified: [("pids.max".to_owned(), "64".to_owned())].into(),
        hugepage_limits: vec![api::HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 }],
        ..Default::default()
    };
    container.resources(resources).with_security(|security| {
        security.seccomp = Some(api::SecurityProfile {
            profile_type: api::security_profile::ProfileType::Localhost.into(),
            localhost_ref: profile.to_owned(),
        });
        security.capabilities =
            Some(api::Capability { drop_capabilities: vec!["CHOWN".to_owned()], ..Default::default() });
        security.masked_paths.push("/etc/passwd".to_owned());
        security.readonly_rootfs = true;
    })
}

fn user(container: ContainerBuilder) -> ContainerBuilder {
    container.with_security(|security| {
        security.seccomp = None;
        security.run_as_user = Some(api::Int64Value { value: 1000 });
        security.run_as_group = Some(api::Int64Value { value: 1000 });
        security.supplemental_groups = vec![4242];
        security.no_new_privs = true;
    })
}

/// Runs all rows in one container; returns what each has printed.
async fn run(
    pod: &Pod,
    name: &str,
    change: impl FnOnce(ContainerBuilder) -> ContainerBuilder,
) -> Result<Vec<String>> {
    // A privileged container has no cgroup namespace.
    let mut script =
        format!("exec 2>&1\nWHO={name}\nCGROUP=/sys/fs/cgroup$(sed 's/^0:://' /proc/self/cgroup)\n");
    for row in &ROWS {
        let _ = writeln!(script, "echo '== {}'\n{}", row.control, row.script);
    }
    let (status, log) =
        change(pod.container(name).script(&script)).run().await.with_context(|| name.to_owned())?;
    let said = log.stdout();
    ensure!(status.exit_code == 0, "{name}: {status:?}: {said}");
    let answers: Vec<_> = said
        .split("== ")
        .skip(1)
        .map(|answer| answer.split_once('\n').unwrap_or_default().1.trim_end().to_owned())
        .collect();
    ensure!(answers.len() == ROWS.len(), "{name}: {said}");
    Ok(answers)
}

#[test]
fn every_control_makes_the_difference_that_it_is_for() -> Result<()> {
    let directory = "/run/pericarp-test-profiles";
    fs::create_dir_all(directory)?;
    let profile = format!("{directory}/no-space.json");
    let rule = r#"{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28}"#;
    fs::write(&profile, format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#))?;
    on_pericarp(async |node| {
        let mut wrong = Vec::new();
        for runtime in [Runtime::Pericarp, Runtime::Runc] {
            let pod = node.with_runtime(runtime).pod(&format!("controls-{runtime}"));
            let pod =
                pod.with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true);
            let pod = pod.run().await?;
            let kinds = ["open", "walled", "user"];
            let seen: Vec<_> = stream::iter(kinds)
                .map(async |kind| {
                    run(&pod, kind, |container| match kind {
                        "open" => open(container),
                        "walled" => walled(container, &profile),
                        _ => user(container),
                    })
                    .await
                })
                .buffered(kinds.len())
                .try_collect()
                .await?;
            for (index, row) in
                ROWS.iter().enumerate().filter(|(_, row)| row.like_runc || runtime == Runtime::Pericarp)
            {
                for (kind, (seen, expected)) in
                    kinds.iter().zip(seen.iter().zip([row.open, row.walled, row.user]))
                {
                    if seen[index] != expected {
                        wrong.push(format!(
                            "{runtime}, {kind}, {}: {:?}, not {expected:?}",
                            row.control, seen[index]
                        ));
                    }
                }
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    })
}

#[test]
fn a_process_has_the_limits_and_ambient_capabilities_of_its_spec() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({})).await?;
        let commands = "ulimit -n; ulimit -Hn; ulimit -c; ulimit -l";
        let usual = machine.shell("usual", commands).await?;
        machine
            .run_container("limited", commands, Vec::new(), |spec| {
                spec["process"]["rlimits"] = json!([
                    { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
                    { "type": "RLIMIT_CORE", "soft": 512, "hard": 512 },
                    { "type": "RLIMIT_MEMLOCK", "soft": 4096, "hard": 4096 },
                ]);
            })
            .await
            .with_context(|| machine.console())?;
        let limited = fs::read_to_string(machine.out("limited"))?;
        assert_eq!(limited.trim(), "123\n456\n1\n4");
        ensure!(usual.lines().zip(limited.lines()).all(|(usual, limited)| usual != limited), "{usual}");

        // A process of a user who is not root has only its ambient capabilities left.
        let out = machine.out("ambient");
        fs::write(&out, "")?;
        fs::set_permissions(&out, fs::Permissions::from_mode(0o666))?;
        let commands = "grep -E 'Cap(Eff|Amb)' /proc/self/status";
        machine
            .run_container("ambient", commands, Vec::new(), |spec| {
                spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
                for set in ["bounding", "permitted", "effective", "inheritable", "ambient"] {
                    spec["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
                }
            })
            .await
            .with_context(|| machine.console())?;
        let ambient = fs::read_to_string(out)?;
        assert_eq!(ambient, "CapEff:\t0000000000002000\nCapAmb:\t0000000000002000\n");
        let usual = machine.shell("usual-ambient", commands).await?;
        ensure!(usual.ends_with("CapAmb:\t0000000000000000"), "{usual}");
        Ok(())
    })
}
