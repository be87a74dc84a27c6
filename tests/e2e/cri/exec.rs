//! `Exec` and `ExecSync`.

use std::time::{Duration, Instant};

use anyhow::Result;
use pericarp_tests::{ExecOutput, cri::streams::Terminal, on_node, on_pericarp};
use tonic::Code;

#[test]
fn exec_tells_output_and_exit_code() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let output = container.exec(["sh", "-c", "echo out; echo err >&2; exit 42"]).await?;
        let expected = ExecOutput { stdout: "out\n".to_owned(), stderr: "err\n".to_owned(), exit_code: 42 };
        assert_eq!(output, expected);
        assert_eq!(container.exec(["true"]).await?.exit_code, 0);
        assert_eq!(container.exec(["sh", "-c", "kill -KILL $$"]).await?.exit_code, 128 + 9);
        let signals = container.exec(["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"]).await?.stdout;
        assert_eq!(signals, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");

        let mut runs = Vec::new();
        for n in 0..8 {
            let container = container.clone();
            runs.push(async move { container.shell(&format!("echo {n}")).await });
        }
        let outputs = futures::future::try_join_all(runs).await?;
        assert_eq!(outputs, (0..8).map(|n| n.to_string()).collect::<Vec<_>>());
        Ok(())
    })
}

#[test]
fn exec_with_a_time_limit_is_ended_at_it() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let start = Instant::now();
        let error = container.try_exec(["sleep", "31337"], Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        assert!(start.elapsed() < Duration::from_secs(60), "it took {:?}", start.elapsed());
        assert!(!container.shell("ps -o args").await?.contains("31337"), "the command lives on");
        Ok(())
    })
}

/// Under runc, the command's children live on, and containerd waits for as long as they have the output open.
#[test]
fn what_a_command_has_started_ends_with_it_at_its_time_limit() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let script = "sleep 31337 & (sleep 31338; true) & echo > /dev/shm/started; wait";
        let error = container.try_exec(["sh", "-c", script], Duration::from_secs(3)).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        let left =
            container.shell("cat /dev/shm/started; ps -o args | grep '^sleep 3133' || echo none").await?;
        assert_eq!(left.trim(), "none");
        Ok(())
    })
}

#[test]
fn exec_of_a_missing_command_or_into_a_dead_container_fails_and_says_so() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let error = container.try_exec(["no-such-command"], Duration::ZERO).await.unwrap_err();
        assert!(error.message().contains("no-such-command"), "{error}");
        assert!(error.message().contains("executable file not found in $PATH"), "{error}");
        container.shell("true").await?;

        container.stop(0).await?;
        let error = container.try_exec(["true"], Duration::ZERO).await.unwrap_err();
        assert!(error.message().contains("CONTAINER_EXITED"), "{error}");
        Ok(())
    })
}

#[test]
fn exec_passes_every_byte_of_a_large_output() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let output = container.exec(["sh", "-c", "seq 300000; seq 100000 >&2"]).await?;
        assert_eq!(output.exit_code, 0);
        check_sequence(&output.stdout, 300_000);
        check_sequence(&output.stderr, 100_000);
        Ok(())
    })
}

#[test]
fn a_terminal_echoes_input_has_a_size_and_tells_the_exit_code() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let mut shell = container.exec_stream(["sh"], Terminal::Yes).await?;
        shell.write("tty; echo a$((1 + 1))b\n").await?;
        shell.read_until("/dev/pts/0").await?;
        shell.read_until("a2b").await?;
        shell.resize(123, 45).await?;
        shell
            .write("until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; echo size-$((3 + 4))\n")
            .await?;
        shell.read_until("size-7").await?;
        // The terminal's own interrupt key ends what runs in the foreground, not the shell.
        shell.write("sh -c 'echo runs-$((4 + 4)); exec sleep 1000'\n").await?;
        shell.read_until("runs-8").await?;
        shell.write("\u{3}").await?;
        shell.write("echo alive-$((5 + 5))\n").await?;
        shell.read_until("alive-10").await?;
        shell.write("exit 9\n").await?;
        let finished = shell.wait_for_end().await?;
        assert_eq!(finished.exit_code, 9, "{finished:?}");
        Ok(())
    })
}

#[test]
fn a_command_without_a_terminal_reads_its_stdin_and_keeps_its_streams_apart() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let script = "read a; read b; echo got $a $b; echo warned >&2; exit 5";
        let mut session = container.exec_stream(["sh", "-c", script], Terminal::No).await?;
        session.write("one\n").await?;
        session.write("two\n").await?;
        let finished = session.wait_for_end().await?;
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("got one two\n", "warned\n"));
        assert_eq!(finished.exit_code, 5);
        Ok(())
    })
}

/// Compares a text with the output of `seq`, without printing megabytes if they differ.
pub fn check_sequence(text: &str, last: u32) {
    let mut lines = text.lines();
    for n in 1..=last {
        assert_eq!(lines.next(), Some(n.to_string().as_str()), "line {n} of {last}");
    }
    assert_eq!(lines.next(), None, "after line {last}");
}
