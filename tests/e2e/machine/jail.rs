//! What surrounds a machine's process on the node: a captured one finds as little as possible.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{Node, node::machine::MachineProcess, on_pericarp, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// The capabilities that serving the share needs (capabilities(7)): `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`,
/// `SETGID`, `SETUID` and `SETFCAP`.
const FOR_FILES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

/// A pod's machine that has had to do something with each of its devices: its directory in /proc.
pub async fn busy_machine(node: &Node) -> Result<PathBuf> {
    let pod = node.pooled_pod().await?;
    let container = pod.idle_container("busy").await?;
    container.shell("cat /etc/passwd > /tmp/copy; head -c 10 /dev/random > /tmp/random").await?;
    let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
    Ok(Path::new("/proc").join(machine.pid.to_string()))
}

/// The value of a key in a process's `status`, or in another file of that form.
pub fn value(status: &str, key: &str) -> Result<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| key.to_owned())?;
    Ok(line.trim_start_matches(':').trim().to_owned())
}

#[test]
fn a_machine_has_namespaces_of_its_own_and_is_alone_in_them() -> Result<()> {
    on_pericarp(async |node| {
        let machine = busy_machine(node).await?;
        for kind in ["pid", "net", "ipc", "uts", "cgroup", "mnt", "user"] {
            let (own, hosts) = (machine.join("ns").join(kind), Path::new("/proc/1/ns").join(kind));
            assert_ne!(fs::read_link(own)?, fs::read_link(hosts)?, "{kind}");
        }
        // What is root there has no capability on the host, although each id is what it is on the host.
        for map in ["uid_map", "gid_map"] {
            let map = fs::read_to_string(machine.join(map))?;
            assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "0", "4294967295"]);
        }
        let status = fs::read_to_string(machine.join("status"))?;
        let numbers = value(&status, "NSpid")?;
        assert_eq!(numbers.split_whitespace().last(), Some("1"), "it is the first of its PID namespace");
        // Its network namespace has nothing: the pod's interfaces reach it as descriptors.
        let interfaces = fs::read_to_string(machine.join("net/dev"))?;
        let names: Vec<_> =
            interfaces.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
        assert_eq!(names, ["lo"]);
        Ok(())
    })
}

/// The directories that a process has open, by the numbers of the mounts that they are on.
fn open_directories(process: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        let path = entry.path();
        let information = fs::read_to_string(process.join("fdinfo").join(entry.file_name()));
        // One may be closed meanwhile.
        let (Ok(metadata), Ok(target), Ok(information)) = (path.metadata(), path.read_link(), information)
        else {
            continue;
        };
        if metadata.is_dir() {
            found.insert(value(&information, "mnt_id")?, target);
        }
    }
    Ok(found)
}

#[test]
fn a_machine_finds_its_share_and_no_other_file_of_the_host() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("busy").await?;
        container.shell("cat /etc/passwd > /tmp/copy").await?;
        let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
        let process = Path::new("/proc").join(machine.pid.to_string());
        for thread in fs::read_dir(process.join("task"))? {
            let thread = thread?.path();
            for place in ["root", "root/..", "cwd"] {
                let names: Vec<_> = fs::read_dir(thread.join(place))?
                    .map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()))
                    .collect::<Result<_>>()?;
                let name = fs::read_to_string(thread.join("comm"))?;
                // virtiofsd changes the directory of its thread for some requests.
                let in_share = name.trim() == "fs" && place == "cwd";
                ensure!(names == ["share"] || in_share, "{place} of {name} has {names:?}");
            }
        }
        for line in machine.mounts()?.lines() {
            let at = line.split(' ').nth(4).context("a mount's place")?;
            ensure!(at == "/" || at == "/share" || at.starts_with("/share/"), "{line}");
        }
        // A directory that is open leads to those above it, as far as its mount reaches.
        let hosts = fs::read_to_string("/proc/self/mountinfo")?;
        let hosts_numbers: Vec<_> = hosts.lines().filter_map(|line| line.split(' ').next()).collect();
        let open = open_directories(&process)?;
        ensure!(!open.is_empty(), "it serves files");
        for (mount, directory) in open {
            ensure!(!hosts_numbers.contains(&mount.as_str()), "{} is open", directory.display());
        }
        ensure!(!hosts.contains(&pod.id) && !hosts.contains(&container.id), "{hosts}");
        Ok(())
    })
}

#[test]
fn only_the_threads_of_the_share_have_capabilities_and_only_those_for_files() -> Result<()> {
    on_pericarp(async |node| {
        let machine = busy_machine(node).await?;
        let mut threads = BTreeMap::new();
        for thread in fs::read_dir(machine.join("task"))? {
            let thread = thread?.path();
            let status = fs::read_to_string(thread.join("status"))?;
            assert_eq!(value(&status, "NoNewPrivs")?, "1", "{status}");
            let sets = ["CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd"].map(|key| {
                value(&status, key).and_then(|value| Ok(u64::from_str_radix(&value, 16)?)).unwrap_or(u64::MAX)
            });
            threads.insert(fs::read_to_string(thread.join("comm"))?.trim().to_owned(), sets);
        }
        for name in ["vcpu0", "vsock", "net0", "fs", "descriptors", "spawner"] {
            ensure!(threads.contains_key(name), "there is no thread {name}: {:?}", threads.keys());
        }
        for (name, [permitted, effective, inheritable, ambient, bounding]) in threads {
            let may = if ["fs", "spawner"].contains(&name.as_str()) { FOR_FILES } else { 0 };
            assert_eq!((permitted, effective, inheritable, ambient), (may, may, 0, 0), "{name}");
            assert_eq!(bounding & !FOR_FILES, 0, "{name} could gain {bounding:x}");
        }
        let limits = fs::read_to_string(machine.join("limits"))?;
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
        // Less than any has; 0 would allow one that goes into a pipe.
        assert_eq!(core.split_whitespace().nth(5), Some("1"), "{core}");
        Ok(())
    })
}

#[test]
fn a_machine_ends_when_it_is_asked_to_although_it_is_the_first_process_of_its_namespace() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("asked").run().await?;
        let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
        // As systemd does with what is left when the node shuts down.
        let pid = Pid::from_raw(machine.pid).context("a process id")?;
        kill_process(pid, Signal::TERM)?;
        wait_until("the end of the machine", async || Ok(!pod.is_ready().await?)).await?;
        assert_eq!(MachineProcess::of_pod(&pod.id)?, None);
        Ok(())
    })
}
