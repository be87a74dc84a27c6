use std::{
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command},
};

use rustix::io::Errno;

use super::*;
use crate::pod::{life::Phase, tests::environment};

fn id() -> SandboxId {
    "abc".parse().unwrap()
}

fn sleeping() -> (Child, Process) {
    let child = Command::new("sleep").arg("60").spawn().unwrap();
    let process = Process::of(child.id()).unwrap();
    (child, process)
}

fn record(run_dir: &Path, machine: Process, cgroup: Option<PathBuf>, stage: Stage) -> Record {
    let directory = run_dir.join("abc");
    fs::create_dir(&directory).unwrap();
    let size = Size { vcpus: 1, memory_mib: 512 };
    let mut record = Record::new(PodSpec::unknown(id(), NAMESPACE), size);
    record.stage = stage;
    record.owned = owned_in(&directory, None, cgroup, Some(machine));
    fs::write(directory.join(file::STATE), serde_json::to_vec(&record).unwrap()).unwrap();
    record
}

/// As if these had been found, and no others.
fn found<const N: usize>(machines: [(PathBuf, Process); N]) -> Arc<Machines> {
    Arc::new(Machines(Mutex::new(Some(machines.into()))))
}

#[tokio::test]
async fn a_machine_that_cannot_be_watched_is_ended_and_its_pod_kept_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let environment = environment(directory.path());
    let (mut child, process) = sleeping();
    let record = record(directory.path(), process, None, Stage::Running);
    let pod = take_over_machine(&environment, record, Err(Errno::MFILE.into())).await.unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(pod.phase(), Phase::Ended);
    let reason = pod.status().reason.unwrap();
    assert!(reason.contains("could not be watched"), "{reason}");
    let on_record = Record::read(&directory.path().join("abc")).unwrap().unwrap();
    assert_eq!(on_record.end.unwrap().reason, Some(reason));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_undone_is_kept_with_its_record_until_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let environment = environment(directory.path());
    let (mut child, process) = sleeping();
    // A cgroup with something in it cannot be removed.
    let cgroup = directory.path().join("abc.cgroup");
    fs::create_dir_all(cgroup.join("busy")).unwrap();
    record(directory.path(), process, Some(cgroup.clone()), Stage::Starting);
    let pod = take_over(&environment, &directory.path().join("abc"), &id(), &Arc::default())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert_eq!(pod.phase(), Phase::Ended);
    let error = chain(&pod.remove().await.unwrap_err());
    assert!(error.contains("cannot remove the pod's cgroup"), "{error}");
    assert!(Record::read(&directory.path().join("abc")).unwrap().is_some());
    fs::remove_dir(cgroup.join("busy")).unwrap();
    // Nobody asks for it again.
    pod.removed().await;
    assert!(!cgroup.exists() && !directory.path().join("abc").exists());
}

#[tokio::test]
async fn a_directory_without_a_record_is_removed_and_a_damaged_record_is_set_aside() {
    let directory = tempfile::tempdir().unwrap();
    let environment = environment(directory.path());
    let of_pod = directory.path().join("abc");
    fs::create_dir(&of_pod).unwrap();
    assert!(take_over(&environment, &of_pod, &id(), &Arc::default()).await.unwrap().is_none());
    assert!(!of_pod.exists());

    let (mut child, process) = sleeping();
    fs::create_dir(&of_pod).unwrap();
    fs::write(of_pod.join(file::STATE), "nonsense").unwrap();
    let machines = found([(of_pod.join(file::CONFIG), process)]);
    let pod = take_over(&environment, &of_pod, &id(), &machines).await.unwrap().unwrap();
    assert_eq!(pod.phase(), Phase::Running { pid: process.pid });
    assert!(of_pod.join("state.json.unusable").exists());
    // The next controller finds it without looking for its machine.
    assert_eq!(Record::read(&of_pod).unwrap().unwrap().owned.machine(), Some(process));
    pod.remove().await.unwrap();
    // Its exit status was taken by whoever watched it.
    let _ = child.wait();
    assert!(!of_pod.exists());
}

#[tokio::test]
async fn a_machine_that_was_spawned_and_is_not_on_record_yet_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let environment = environment(directory.path());
    let of_pod = directory.path().join("abc");
    let (mut child, process) = sleeping();
    let mut record = record(directory.path(), process, None, Stage::Starting);
    record.owned = owned_in(&of_pod, None, None, None);
    fs::write(of_pod.join(file::STATE), serde_json::to_vec(&record).unwrap()).unwrap();
    let machines = found([(of_pod.join(file::CONFIG), process)]);
    assert!(take_over(&environment, &of_pod, &id(), &machines).await.unwrap().is_none());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(!of_pod.exists());
}

/// As a node has them that was full of pods when its controller was restarted.
#[tokio::test]
async fn a_thousand_pods_are_taken_over_together() {
    let directory = tempfile::tempdir().unwrap();
    let environment = environment(directory.path());
    let (mut child, process) = sleeping();
    for number in 0..1000 {
        let of_pod = directory.path().join(format!("pod{number}"));
        fs::create_dir(&of_pod).unwrap();
        let spec = PodSpec::unknown(format!("pod{number}").parse().unwrap(), NAMESPACE);
        let mut record = Record::new(spec, Size { vcpus: 1, memory_mib: 512 });
        record.stage = Stage::Running;
        record.owned = owned_in(&of_pod, None, None, Some(process));
        fs::write(of_pod.join(file::STATE), serde_json::to_vec(&record).unwrap()).unwrap();
    }
    let adopted = adopt_all(&environment).await.unwrap();
    assert_eq!(adopted.len(), 1000);
    assert!(adopted.iter().all(|pod| pod.phase() == Phase::Running { pid: process.pid }));
    child.kill().unwrap();
    for pod in adopted {
        pod.wait().await;
    }
    let _ = child.wait();
}
