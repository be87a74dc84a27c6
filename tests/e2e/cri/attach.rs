//! `Attach`.

use anyhow::Result;
use pericarp_tests::{ContainerBuilder, Pod, api, cri::streams::Terminal, on_node};

/// A container that repeats each line of its stdin.
fn reader(pod: &Pod) -> ContainerBuilder {
    pod.container("reader")
        .script("while read line; do echo read $line; [ $line = end ] && exit 6; done; echo no more")
        .with(|config| config.stdin = true)
}

/// A shell at a terminal.
fn shell(pod: &Pod) -> ContainerBuilder {
    pod.container("shell").command(["sh"]).with(|config| {
        config.stdin = true;
        config.tty = true;
    })
}

#[test]
fn attach_reaches_the_containers_own_process() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = reader(&pod).start().await?;
        let mut first = container.attach(Terminal::No).await?;
        first.write("first\n").await?;
        first.read_until("read first").await?;

        // A second client at the same time receives the same output, and may write.
        let mut second = container.attach(Terminal::No).await?;
        second.write("second\n").await?;
        second.read_until("read second").await?;
        first.read_until("read second").await?;

        // A client that goes away, with or without closing its streams, ends neither the container nor the other
        // client.
        first.close().await?;
        second.write("third\n").await?;
        second.read_until("read third").await?;
        drop(second);
        let mut last = container.attach(Terminal::No).await?;
        last.write("end\n").await?;
        last.read_until("read end").await?;
        assert_eq!(container.wait_for_exit().await?.exit_code, 6);
        assert_eq!(container.log()?.stdout(), "read first\nread second\nread third\nread end\n");
        Ok(())
    })
}

#[test]
fn stdin_that_is_to_be_open_once_ends_with_its_client() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = reader(&pod).with(|config| config.stdin_once = true).start().await?;
        let mut client = container.attach(Terminal::No).await?;
        client.write("something\n").await?;
        client.read_until("read something").await?;
        assert_eq!(container.status().await?.state(), api::ContainerState::ContainerRunning);
        client.close().await?;
        assert_eq!(container.wait_for_exit().await?.exit_code, 0);
        assert_eq!(container.log()?.stdout(), "read something\nno more\n");
        Ok(())
    })
}

#[test]
fn a_terminal_outlives_clients_that_are_lost() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = shell(&pod).start().await?;
        let mut client = container.attach(Terminal::Yes).await?;
        client.write("kept=yes; echo at-$((2 + 2))\n").await?;
        client.read_until("at-4").await?;
        drop(client);
        let mut client = container.attach(Terminal::Yes).await?;
        client.write("echo kept-$kept\n").await?;
        client.read_until("kept-yes").await?;

        let mut command = container.exec_stream(["sh"], Terminal::Yes).await?;
        command.write("echo in-$((3 + 3))\n").await?;
        command.read_until("in-6").await?;
        drop(command);
        assert_eq!(container.exec(["echo", "on"]).await?.stdout, "on\n");
        client.write("exit 3\n").await?;
        assert_eq!(container.wait_for_exit().await?.exit_code, 3);
        Ok(())
    })
}

#[test]
fn a_container_with_a_terminal_can_be_attached_to() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = shell(&pod).start().await?;
        let mut session = container.attach(Terminal::Yes).await?;
        session.write("tty; exit 3\n").await?;
        session.read_until("/dev/pts/0").await?;
        assert_eq!(container.wait_for_exit().await?.exit_code, 3);
        Ok(())
    })
}
