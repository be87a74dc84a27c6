//! Pods and containers: their life, their lists, their statistics and their events.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use pericarp_tests::{Container, ExecOutput, HANG_LIMIT, Node, Pod, api, on_node};
use tokio::{task::JoinHandle, time::timeout};

fn output(stdout: &str) -> ExecOutput {
    ExecOutput { stdout: stdout.to_owned(), stderr: String::new(), exit_code: 0 }
}

/// The ids of the containers that a filter finds.
async fn listed(node: &Node, filter: api::ContainerFilter) -> Result<Vec<String>> {
    let request = api::ListContainersRequest { filter: Some(filter) };
    let containers = node.cri.runtime().list_containers(request).await?.into_inner().containers;
    Ok(containers.into_iter().map(|container| container.id).collect())
}

/// The ids of the containers for which a filter finds statistics.
async fn with_statistics(node: &Node, filter: Option<api::ContainerStatsFilter>) -> Result<Vec<String>> {
    let request = api::ListContainerStatsRequest { filter };
    let stats = node.cri.runtime().list_container_stats(request).await?.into_inner().stats;
    Ok(stats.into_iter().filter_map(|stats| stats.attributes).map(|attributes| attributes.id).collect())
}

fn labelled(value: &str) -> HashMap<String, String> {
    [("foo".to_owned(), value.to_owned())].into()
}

#[test]
fn a_pod_that_names_nothing_has_a_life_like_any_other() -> Result<()> {
    use api::ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
        ContainerStoppedEvent as StoppedContainerd,
    };
    on_node(async |node| {
        let told = CriEvents::listen(node);
        let pod = node.pod("bare").minimal().run().await?;
        assert!(pod.is_ready().await?);
        let by_id = api::PodSandboxFilter { id: pod.id.clone(), ..Default::default() };
        let request = api::ListPodSandboxRequest { filter: Some(by_id) };
        let pods = node.cri.runtime().list_pod_sandbox(request).await?.into_inner().items;
        assert_eq!(pods.len(), 1, "{pods:?}");

        let container = pod.container("default").minimal().with(|config| config.labels = labelled("bar"));
        let container = container.start().await?;
        check_commands(&container).await?;
        check_list_and_statistics(node, &pod, &container).await?;

        let created = pod.container("created").minimal().create().await?;
        created.remove().await?;
        // A container can be removed although it is running.
        container.remove().await?;
        for gone in [&created, &container] {
            let filter = api::ContainerFilter { id: gone.id.clone(), ..Default::default() };
            assert_eq!(listed(node, filter).await?, Vec::<String>::new());
        }
        let stopped = pod.container("stopped").minimal().command(["sh", "-c", "top"]).start().await?;
        stopped.stop(60).await?;
        assert_eq!(stopped.status().await?.state(), api::ContainerState::ContainerExited);
        stopped.remove().await?;
        stopped.remove().await.context("remove a container that has been removed")?;

        pod.stop().await?;
        pod.stop().await.context("stop a pod that has been stopped")?;
        pod.remove().await?;
        let life = [Created, Started, StoppedContainerd, Deleted];
        assert_eq!(told.of(&pod.id).await?, life);
        assert_eq!(told.of(&stopped.id).await?, life);
        // The last two events of a container that is removed while it runs are sent in either order: containerd lets
        // the removal go on before it sends that the container has stopped (`criService.handleContainerExit`).
        let mut of_removed = told.of(&container.id).await?;
        of_removed.sort_unstable();
        assert_eq!(of_removed, life);
        Ok(())
    })
}

async fn check_commands(container: &Container) -> Result<()> {
    assert_eq!(container.exec(["echo", "-n", "hello"]).await?, output("hello"));
    let node_name = rustix::system::uname();
    assert_eq!(container.shell("hostname").await?, node_name.nodename().to_str()?);
    assert!(container.shell("cat /proc/sysvipc/shm").await?.contains("shmid"));
    // The PID namespace is the pod's, so somebody else is its first process.
    assert!(!container.shell("cat /proc/1/cmdline").await?.contains("top"));
    let late = container.try_exec(["sleep", "4321"], Duration::from_secs(1)).await;
    assert_eq!(late.as_ref().map_err(tonic::Status::code), Err(tonic::Code::DeadlineExceeded), "{late:?}");
    assert_eq!(container.exec(["sh", "-c", "ps -o args | grep '^sleep 4321' || true"]).await?, output(""));
    let refused = container.exec(["mkdir", "/sys/fs/cgroup/critest"]).await?;
    assert!(refused.exit_code == 1 && refused.stderr.contains("Read-only file system"), "{refused:?}");
    // No profile is asked for, so there is none.
    assert_eq!(container.shell("grep ^Seccomp: /proc/self/status").await?, "Seccomp:\t0");
    Ok(())
}

async fn check_list_and_statistics(node: &Node, pod: &Pod, container: &Container) -> Result<()> {
    let of_pod = api::ContainerFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
    assert_eq!(listed(node, of_pod).await?, [container.id.as_str()]);
    let by_id = api::ContainerStatsFilter { id: container.id.clone(), ..Default::default() };
    assert_eq!(with_statistics(node, Some(by_id)).await?, [container.id.as_str()]);
    assert!(with_statistics(node, None).await?.contains(&container.id));
    for (label, expected) in [("bar", true), ("baz", false)] {
        let filter = api::ContainerStatsFilter { label_selector: labelled(label), ..Default::default() };
        assert_eq!(with_statistics(node, Some(filter)).await?.contains(&container.id), expected, "{label}");
    }
    let stats = container.stats().await?;
    let name = stats.attributes.and_then(|attributes| attributes.metadata).context("metadata")?.name;
    assert_eq!(name, "default");
    assert_ne!(stats.cpu.context("processor time")?.timestamp, 0);
    assert_ne!(stats.memory.context("memory")?.timestamp, 0);
    Ok(())
}

#[test]
fn what_is_not_there_can_be_stopped_and_removed() -> Result<()> {
    on_node(async |node| {
        let nobody = || "5d1b5e0c-0000-0000-0000-000000000000".to_owned();
        let mut runtime = node.cri.runtime();
        runtime.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: nobody() }).await?;
        runtime.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: nobody() }).await?;
        runtime.stop_container(api::StopContainerRequest { container_id: nobody(), timeout: 0 }).await?;
        runtime.remove_container(api::RemoveContainerRequest { container_id: nobody() }).await?;
        Ok(())
    })
}

/// The last two events of a pod or container.
const OF_THE_END: [api::ContainerEventType; 2] =
    [api::ContainerEventType::ContainerStoppedEvent, api::ContainerEventType::ContainerDeletedEvent];

/// The events of CRI's own event stream (`GetContainerEvents`), by the pod or container that they are about.
struct CriEvents {
    events: Arc<Mutex<HashMap<String, Vec<api::ContainerEventType>>>>,
    task: JoinHandle<()>,
}

impl CriEvents {
    /// Subscribes. (containerd responds only with the first event, so there is nothing to wait for.)
    fn listen(node: &Node) -> CriEvents {
        let events: Arc<Mutex<HashMap<_, Vec<_>>>> = Arc::default();
        let (mut runtime, told) = (node.cri.runtime(), Arc::clone(&events));
        let task = tokio::spawn(async move {
            let Ok(answer) = runtime.get_container_events(api::GetEventsRequest::default()).await else {
                return;
            };
            let mut stream = answer.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                let kind = event.container_event_type();
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                told.entry(event.container_id).or_default().push(kind);
            }
        });
        CriEvents { events, task }
    }

    /// The events of a pod or container, as soon as those of its end are there.
    async fn of(&self, id: &str) -> Result<Vec<api::ContainerEventType>> {
        let known = || {
            self.events.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
        };
        let deleted = async {
            while !OF_THE_END.iter().all(|event| known().contains(event)) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let waited = timeout(HANG_LIMIT, deleted).await;
        waited.with_context(|| format!("of {id} is told {:?}", known()))?;
        Ok(known())
    }
}

impl Drop for CriEvents {
    fn drop(&mut self) {
        self.task.abort();
    }
}
