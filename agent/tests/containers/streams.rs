//! Standard input and output.

use std::time::Duration;

use containerd_shim_protos::api;

use crate::harness::{Agent, context, process};

/// Bytes that differ from place to place, so that a mix-up of pieces shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// How much goes in and out: hundreds of times what is on its way at once.
const LENGTH: usize = 16 << 20;

/// Waits for the end of a process, whose exit the agent takes at once.
async fn reaped(pid: u32) {
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn many_megabytes_go_in_and_come_out_in_order() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["cat"]);
    let (mut stdin, stdout) = (agent.stream("c1-stdin").await, agent.stream("c1-stdout").await);
    agent.create("c1", &["stdin", "stdout"]).await;
    agent.start_task("c1").await;
    let sent = pattern(LENGTH);
    let expected = sent.clone();
    let write = async move {
        let mut credit = 0;
        // Pieces of odd sizes, small ones among them.
        let sizes = [1, 3, 17, 4096, 32768, 5000, 1, 1, 32768, 32768];
        let mut rest = sent.as_slice();
        for size in sizes.into_iter().cycle() {
            if rest.is_empty() {
                break;
            }
            while credit == 0 {
                credit += stdin.credit().await;
            }
            let length = size.min(rest.len()).min(credit);
            stdin.write(&rest[..length]).await;
            rest = &rest[length..];
            credit -= length;
        }
        // containerd's client closes the stream and then at once the connection.
        stdin.stream.close_send().await.unwrap();
    };
    let (received, ()) = tokio::join!(stdout.read_to_end(), write);
    assert_eq!(received.len(), LENGTH);
    assert!(received == expected, "the bytes are in another order");
    assert_eq!(agent.wait("c1", "").await, 0);
}

#[tokio::test]
async fn output_waits_for_credit_and_for_a_new_reader() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo end"]);
    let mut first = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    first.grant(1000).await;
    let mut read = 0;
    while read < 1000 {
        read += first.read().await.unwrap().len();
    }
    assert_eq!(read, 1000);
    let more = tokio::time::timeout(Duration::from_millis(200), first.stream.recv()).await;
    assert!(more.is_err(), "output beyond what was granted");
    // containerd is restarted: the newest connection gets what the old one has not taken.
    let second = agent.stream("c1-stdout").await;
    let rest = second.read_to_end().await;
    assert_eq!(rest.len(), 300_000 - 1000 + 4);
    assert!(rest.ends_with(b"xend\n"));
    assert_eq!(agent.wait("c1", "").await, 0);
}

#[tokio::test]
async fn a_stream_that_comes_late_gets_everything() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["echo", "patience"]);
    let pid = agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    reaped(pid).await;
    assert_eq!(agent.stream("c1-stdout").await.read_to_end().await, b"patience\n");
    assert_eq!(agent.wait("c1", "").await, 0);
    // Once more, after the end: there is nothing left.
    assert_eq!(agent.stream("c1-stdout").await.read_to_end().await, b"");
}

#[tokio::test]
async fn wait_returns_after_the_reader_has_taken_everything() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "head -c 40000 /dev/zero"]);
    let stdout = agent.stream("c1-stdout").await;
    let pid = agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    reaped(pid).await;
    let wait = agent.wait("c1", "");
    tokio::pin!(wait);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut wait).await;
    assert!(early.is_err(), "the output has not been read");
    let (output, exit) = tokio::join!(stdout.read_to_end(), wait);
    assert_eq!((output.len(), exit), (40_000, 0));
}

#[tokio::test]
async fn an_execs_end_is_told_though_its_child_holds_the_output() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let stdout = agent.stream("e1-stdout").await;
    agent.exec("c1", "e1", process(&["sh", "-c", "sleep 1000 & echo started"]), &["stdout"]).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 0);
    let read = stdout.read_to_end();
    tokio::pin!(read);
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut read).await.is_err());
    // containerd deletes the exec to get the stream's end.
    agent.delete("c1", "e1").await.unwrap();
    assert_eq!(read.await, b"started\n");
}

#[tokio::test]
async fn close_io_ends_the_input() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let (mut stdin, stdout) = (agent.stream("e1-stdin").await, agent.stream("e1-stdout").await);
    agent.exec("c1", "e1", process(&["cat"]), &["stdin", "stdout"]).await.unwrap();
    assert!(stdin.credit().await > 0);
    stdin.write(b"last words").await;
    let mut request = api::CloseIORequest::new();
    request.id = "c1".into();
    request.exec_id = "e1".into();
    request.stdin = true;
    agent.task.close_io(context(), &request).await.unwrap();
    // Gone without a word, as after a crash: the input is complete now.
    drop(stdin);
    assert_eq!(stdout.read_to_end().await, b"last words");
    assert_eq!(agent.wait("c1", "e1").await, 0);
}

/// containerd was restarted: what its first life has sent is read before anything of its second.
#[tokio::test]
async fn input_that_a_reader_has_not_taken_is_not_lost_with_its_connection() {
    const BEFORE: usize = 128 << 10;
    let agent = Agent::start().await;
    // Nothing is read until the second connection is there, so that the pipe is full and bytes wait in the agent.
    agent.add_container("c1", &["sh", "-c", "until [ -e /dev/shm/second ]; do sleep 0.1; done; cat"]);
    let (mut first, stdout) = (agent.stream("c1-stdin").await, agent.stream("c1-stdout").await);
    agent.create("c1", &["stdin", "stdout"]).await;
    agent.start_task("c1").await;
    let expected = pattern(BEFORE + 1000);
    let mut sent = 0;
    let mut credit = 0;
    while sent < BEFORE {
        if credit == 0 {
            match tokio::time::timeout(Duration::from_secs(1), first.credit()).await {
                Ok(more) => credit = more,
                // Nobody reads, so no more is granted.
                Err(_) => break,
            }
        }
        let length = credit.min(BEFORE - sent).min(7000);
        first.write(&expected[sent..sent + length]).await;
        sent += length;
        credit -= length;
    }
    assert!(sent > 64 << 10, "only {sent} bytes are taken");
    drop(first);
    let mut second = agent.stream("c1-stdin").await;
    agent.exec("c1", "e1", process(&["sh", "-c", ": > /dev/shm/second"]), &[]).await.unwrap();
    assert!(second.credit().await >= 1000);
    second.write(&expected[sent..sent + 1000]).await;
    second.stream.close_send().await.unwrap();
    let received = stdout.read_to_end().await;
    assert_eq!(received.len(), sent + 1000);
    assert!(received == expected[..sent + 1000], "the bytes are in another order");
}

#[tokio::test]
async fn a_terminal_carries_both_directions_and_has_a_size() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let (mut stdin, mut stdout) = (agent.stream("e1-stdin").await, agent.stream("e1-stdout").await);
    let mut shell = process(&["sh"]);
    shell["terminal"] = true.into();
    agent.exec("c1", "e1", shell, &["stdin", "stdout"]).await.unwrap();
    let mut request = api::ResizePtyRequest::new();
    request.id = "c1".into();
    request.exec_id = "e1".into();
    (request.width, request.height) = (132, 43);
    agent.task.resize_pty(context(), &request).await.unwrap();
    stdin.credit().await;
    stdin.write(b"stty size; readlink /proc/self/fd/1; exit 9\n").await;
    stdout.grant(65536).await;
    let mut output = Vec::new();
    while let Some(data) = stdout.read().await {
        output.extend(data);
    }
    let output = String::from_utf8_lossy(&output);
    assert!(output.contains("43 132") && output.contains("/dev/pts/"), "{output}");
    assert_eq!(agent.wait("c1", "e1").await, 9);
}

#[tokio::test]
async fn a_containers_terminal_is_its_console() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "echo on the console >/dev/console"]);
    let stdout = agent.stream("c1-stdout").await;
    let mut request = Agent::create_request("c1", &["stdout"]);
    request.terminal = true;
    agent.task.create(context(), &request).await.unwrap();
    agent.start_task("c1").await;
    assert_eq!(stdout.read_to_end().await, b"on the console\r\n");
    assert_eq!(agent.wait("c1", "").await, 0);
}

#[tokio::test]
async fn an_unprivileged_process_can_open_its_output_again() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "id -u >/proc/self/fd/1"]).change(|spec| {
        spec["process"]["user"] = serde_json::json!({ "uid": 1000, "gid": 1000 });
        spec["process"].as_object_mut().unwrap().remove("capabilities");
    });
    let stdout = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    assert_eq!(stdout.read_to_end().await, b"1000\n");
}

/// What `seq LAST` prints.
fn sequence(last: usize) -> String {
    let numbers: Vec<_> = (1..=last).map(|n| n.to_string()).collect();
    numbers.join("\n") + "\n"
}

#[tokio::test]
async fn fifty_containers_that_write_at_once_lose_nothing() {
    // More than a pipe and a stream's credit hold.
    const LAST: usize = 30_000;
    let agent = Agent::start().await;
    let mut outputs = Vec::new();
    for n in 0..50 {
        let id = format!("c{n}");
        agent.add_container(&id, &["seq", &LAST.to_string()]);
        outputs.push(agent.stream(&format!("{id}-stdout")).await);
        agent.create(&id, &["stdout"]).await;
        // Its pipe fills up, and it waits for the reader.
        agent.start_task(&id).await;
    }
    let expected = sequence(LAST);
    let read = outputs.into_iter().enumerate().map(|(n, output)| {
        let (agent, expected) = (&agent, &expected);
        async move {
            let id = format!("c{n}");
            let (output, exit) = tokio::join!(output.read_to_end(), agent.wait(&id, ""));
            assert!(output == expected.as_bytes(), "container {n}: {} bytes or their order", output.len());
            assert_eq!(exit, 0);
        }
    });
    futures::future::join_all(read).await;
}

#[tokio::test]
async fn a_reader_that_never_reads_holds_up_its_own_container_only() {
    let agent = Agent::start().await;
    agent.add_container("stuck", &["sh", "-c", "yes & yes >&2 & wait"]);
    agent.add_container("absent", &["yes"]);
    agent.add_container("other", &["seq", "50000"]);
    // One grants nothing, one a little, and for one stream nobody comes at all.
    let silent = agent.stream("stuck-stdout").await;
    let mut stingy = agent.stream("stuck-stderr").await;
    stingy.grant(100).await;
    agent.create("stuck", &["stdout", "stderr"]).await;
    agent.create("absent", &["stdout"]).await;
    for id in ["stuck", "absent"] {
        agent.start_task(id).await;
    }
    let output = agent.stream("other-stdout").await;
    agent.create("other", &["stdout"]).await;
    agent.start_task("other").await;
    assert!(output.read_to_end().await == sequence(50_000).as_bytes());
    assert_eq!(agent.wait("other", "").await, 0);
    // Even in the same container.
    let output = agent.stream("e1-stdout").await;
    agent.exec("stuck", "e1", process(&["echo", "lively"]), &["stdout"]).await.unwrap();
    assert_eq!(output.read_to_end().await, b"lively\n");
    // It is stopped all the same, if after a while.
    agent.kill("stuck", 9).await.unwrap();
    assert_eq!(agent.wait("stuck", "").await, 137);
    drop(silent);
}
