//! Container logs in CRI's format.

use anyhow::Result;
use futures::{StreamExt, TryStreamExt, stream};
use pericarp_tests::{cri::log::Stream, on_node, wait_until};

use crate::cri::exec::check_sequence;

#[test]
fn a_log_holds_both_streams_with_times_and_tags() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let script = "echo out; sleep 0.2; echo err >&2; sleep 0.2; printf 'no line end'";
        let (_, log) = pod.container("both").script(script).run().await?;
        let found: Vec<_> =
            log.lines.iter().map(|line| (line.stream, line.partial, line.text.as_str())).collect();
        let expected = [
            (Stream::Stdout, false, "out"),
            (Stream::Stderr, false, "err"),
            // containerd's mark for a last line without an end.
            (Stream::Stdout, true, "no line end"),
        ];
        assert_eq!(found, expected);
        assert!(
            log.lines.iter().all(|line| line.time.starts_with("20") && line.time.contains('T')),
            "{log:?}"
        );
        assert!(log.lines.is_sorted_by(|a, b| a.time <= b.time), "{log:?}");

        // Longer than containerd's own limit of 16 KiB for one line.
        let (_, log) =
            pod.container("long").script("head -c 40000 /dev/zero | tr '\\0' x; echo").run().await?;
        assert!(log.lines.len() >= 3 && log.lines[0].partial, "{} lines", log.lines.len());
        assert_eq!(log.stdout(), format!("{}\n", "x".repeat(40_000)));
        Ok(())
    })
}

#[test]
fn a_log_loses_nothing_of_a_large_output_that_ends_with_its_container() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        // The container writes 2 MB to one stream while it writes to the other.
        let padding = "x".repeat(194);
        let script = format!("seq -w 10000 | sed 's/$/{padding}/' & seq 10000 >&2; wait");
        let (status, log) = pod.container("loud").script(&script).run().await?;
        assert_eq!(status.exit_code, 0);
        let stdout = log.stdout();
        assert_eq!(stdout.len(), 2_000_000);
        for (n, line) in (1..=10_000).zip(stdout.lines()) {
            assert_eq!(line, format!("{n:05}{padding}"));
        }
        check_sequence(&log.stderr(), 10_000);

        let quick = (0..10).map(async |n| {
            let container = pod.container(&format!("quick-{n}")).command(["echo", "done"]);
            anyhow::Ok(container.run().await?.1.stdout())
        });
        for stdout in futures::future::try_join_all(quick).await? {
            assert_eq!(stdout, "done\n");
        }
        Ok(())
    })
}

#[test]
fn a_rotated_log_goes_on_in_a_new_file() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("ticks")
            .script("n=0; while :; do n=$((n+1)); echo $n; sleep 0.1; done")
            .start()
            .await?;
        wait_until("three lines", async || Ok(container.log()?.lines.len() >= 3)).await?;
        let old = container.log_path().with_extension("old");
        std::fs::rename(container.log_path(), &old)?;
        container.reopen_log().await?;
        wait_until("three lines", async || Ok(container.log()?.lines.len() >= 3)).await?;
        container.stop(0).await?;
        let both = pericarp_tests::cri::log::Log::read(&old)?.stdout() + &container.log()?.stdout();
        check_sequence(&both, both.lines().count().try_into()?);
        Ok(())
    })
}

#[test]
fn containers_that_write_at_once_lose_nothing() -> Result<()> {
    const LINES: u32 = 5_000;
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        // All wait to open the gate for reading; while somebody has it open for writing, they can.
        let gate = pod.container("gate").script("mkfifo /dev/shm/gate; sleep infinity").start().await?;
        gate.shell("until [ -p /dev/shm/gate ]; do sleep 0.1; done").await?;
        let script = format!("true < /dev/shm/gate; seq {LINES}; seq {LINES} >&2");
        // Fifty would take long to start; the agent has as many in its own test.
        let start = (0..8).map(|n| pod.container(&format!("writer-{n}")).script(&script).start());
        let writers: Vec<_> = stream::iter(start).buffered(4).try_collect().await?;
        // Not by a command in the background: it would have the command's output open for as long as it waits for a
        // reader.
        pod.container("opener").script("exec sleep infinity > /dev/shm/gate").start().await?;
        for writer in &writers {
            assert_eq!(writer.wait_for_exit().await?.exit_code, 0);
            let log = writer.log()?;
            check_sequence(&log.stdout(), LINES);
            check_sequence(&log.stderr(), LINES);
        }
        Ok(())
    })
}
