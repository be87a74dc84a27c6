//! Ports that are the container's alone, a sysctl that is not in the safe set, and streams without input.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use pericarp_tests::{HANG_LIMIT, Network, api, cri::streams::Terminal, on_node};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

const PORT: u16 = 80;

/// The server's name, as soon as the server responds.
async fn ask(server: SocketAddr) -> Result<String> {
    let mut answer = String::new();
    let asked = async {
        let mut stream = loop {
            match TcpStream::connect(server).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        stream.write_all(b"name\n").await?;
        stream.read_to_string(&mut answer).await
    };
    timeout(HANG_LIMIT, asked).await.with_context(|| format!("ask {server}"))??;
    Ok(answer)
}

#[test]
fn a_containers_port_an_unsafe_sysctl_and_streams_work_in_a_bare_pod() -> Result<()> {
    on_node(async |node| {
        let logs = node.directory_for("logs")?;
        let pod = node.with_network(Network::Dual).pod("ports").minimal().with(|config| {
            config.log_directory = logs.clone();
            // As kubelet's, and also critest's, where the node has no port for it; that network's plugins are told.
            config.port_mappings =
                vec![api::PortMapping { container_port: PORT.into(), ..Default::default() }];
            config.hostname = "test-hostname".to_owned();
            config.dns_config = Some(api::DnsConfig::default());
        });
        let pod = pod.with_linux(|linux| {
            linux.sysctls.insert("fs.mqueue.msg_max".to_owned(), "100".to_owned());
        });
        let pod = pod.run().await?;
        let server =
            pod.container("server").minimal().command(["peer", "serve", "0.0.0.0:80"]).start().await?;
        let speaker =
            pod.container("speaker").minimal().command(["sh", "-c", "echo hello World; sleep 1000"]);
        let speaker = speaker.with(|config| config.log_path = "speaker.log".to_owned()).start().await?;

        let address = pod.addresses().await?.first().copied().context("the pod's address")?;
        assert_eq!(ask(SocketAddr::new(address, PORT)).await?, "test-hostname\n");
        assert_eq!(server.shell("hostname").await?, "test-hostname");
        assert!(server.shell("netstat -ln").await?.contains("0.0.0.0:80 "));
        assert_eq!(server.shell("cat /proc/sys/fs/mqueue/msg_max").await?, "100");
        speaker.wait_for_output("hello World\n").await?;
        assert_eq!(speaker.status().await?.log_path, format!("{logs}/speaker.log"));

        let echo = ["echo", "-n", "hello"];
        let finished = server.exec_output(echo).await?;
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("hello", ""));
        let finished = server.exec_stream(echo, Terminal::Yes).await?.wait_for_end().await?;
        assert_eq!((finished.stdout.as_str(), finished.exit_code), ("hello", 0));
        Ok(())
    })
}
