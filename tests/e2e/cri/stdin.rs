//! Large binary input on the standard input of commands and of containers.

use std::fs;

use anyhow::Result;
use pericarp_tests::{
    Container,
    cri::streams::{Session, Terminal},
    on_node,
};

/// The bytes of a block. No buffer has this length, so that a mix-up of pieces shows.
const BLOCK: u32 = 1_000_003;
/// How many blocks are sent. More would take an emulated node minutes.
const BLOCKS: u32 = 10;

/// Sends all blocks to a command that prints the checksum of its input, and compares that with a file's checksum.
async fn check(block: &[u8], mut session: Session, container: &Container) -> Result<()> {
    for _ in 0..BLOCKS {
        for piece in block.chunks(30_000) {
            session.write(piece).await?;
        }
    }
    let expected = format!("for i in $(seq {BLOCKS}); do cat /binary/block; done | md5sum");
    session.read_until(&container.shell(&expected).await?).await
}

#[test]
fn megabytes_of_binary_stdin_reach_a_command_and_an_attached_container_unchanged() -> Result<()> {
    on_node(async |node| {
        let block: Vec<u8> = (0..BLOCK).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let directory = node.directory_for("binary")?;
        fs::write(format!("{directory}/block"), &block)?;
        let sum = format!("head -c {} | md5sum", BLOCK * BLOCKS);
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("reader")
            .script(&format!("{sum}; sleep infinity"))
            .mount(&directory, "/binary", true)
            .with(|config| config.stdin = true)
            .start()
            .await?;
        check(&block, container.attach(Terminal::No).await?, &container).await?;
        check(&block, container.exec_stream(["sh", "-c", &sum], Terminal::No).await?, &container).await
    })
}
