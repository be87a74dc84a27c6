//! Only the agent can speak to the controller for its guest; other processes in the guest cannot.

use anyhow::{Result, ensure};
use pericarp_tests::{
    Container, Pod, api, node::controller::KilledController, on_pericarp, on_pericarp_alone,
};

use crate::resilience::wait_until_ready;

/// A container that may use any socket there is: containerd's own seccomp profile has no vsock.
async fn unconfined(pod: &Pod, name: &str, command: &str) -> Result<Container> {
    pod.container(name)
        .script(command)
        .with_security(|security| {
            security.seccomp = Some(api::SecurityProfile {
                profile_type: api::security_profile::ProfileType::Unconfined.into(),
                ..Default::default()
            });
        })
        .start()
        .await
}

#[test]
fn a_process_in_a_container_can_neither_reach_the_host_service_nor_stand_in_for_the_agent() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pooled_pod().await?;
        let container = unconfined(&pod, "impostor", "sleep 1000000").await?;
        let told = container.shell("peer vsock try").await?;
        let outcome = |what: &str| told.lines().find_map(|line| line.strip_prefix(what)).map(str::to_owned);
        // It can use vsock at all: a port that is nobody's is free.
        for at in ["any", "guest"] {
            assert_eq!(outcome(&format!("bind {at}:1028")).as_deref(), Some(": done"), "{told}");
        }
        for port in [1024, 1025, 1026, 1027] {
            for at in ["host", "guest", "local"] {
                let line = outcome(&format!("connect {at}:{port}")).unwrap_or_default();
                ensure!(line.starts_with(": refused"), "port {port} at {at}: {told}");
            }
        }
        for port in [1024, 1026, 1027] {
            for at in ["any", "guest"] {
                let line = outcome(&format!("bind {at}:{port}")).unwrap_or_default();
                ensure!(line.starts_with(": refused"), "port {port} at {at}: {told}");
            }
        }
        // It is the host's port, not the guest's: to have it in the guest is worth nothing.
        pod.idle_container("next").await?;
        Ok(())
    })
}

#[test]
fn a_container_that_holds_every_connection_it_can_get_does_not_keep_the_agent_out() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("held").run().await?;
        let holder = unconfined(&pod, "holder", "peer vsock hold").await?;
        holder.wait_for_output("holding 0\n").await?;
        let before = pod.idle_container("before").await?;
        assert_eq!(before.shell("echo fine").await?, "fine");
        // Also when the controller has to find its way back.
        KilledController::kill()?.restart().await?;
        wait_until_ready(&pod).await?;
        let after = pod.idle_container("after").await?;
        assert_eq!(after.shell("echo fine").await?, "fine");
        assert_eq!(before.shell("echo fine").await?, "fine");
        after.stop(0).await?;
        after.remove().await?;
        pod.container("last").command(["true"]).run().await?;
        Ok(())
    })
}
