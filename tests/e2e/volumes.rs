//! Bind volumes.

use std::fs;

use anyhow::Result;
use pericarp_tests::on_node;

#[test]
fn directories_and_files_of_the_node_are_volumes() -> Result<()> {
    on_node(async |node| {
        let file = node.file("config/key", "value\n")?;
        let directory = file.trim_end_matches("/key");
        let single = node.file("single", "one file\n")?;
        let pod = node.pod("volumes").run().await?;
        let container = pod
            .container("user")
            .mount(directory, "/rw", false)
            .mount(directory, "/ro", true)
            .mount(&single, "/etc/single", true)
            .start()
            .await?;
        assert_eq!(container.shell("cat /rw/key /ro/key /etc/single").await?, "value\nvalue\none file");
        container.shell("echo from inside > /rw/new && chown 1000:2000 /rw/new").await?;
        assert_eq!(fs::read_to_string(format!("{directory}/new"))?, "from inside\n");
        assert_eq!(container.shell("cat /ro/new").await?, "from inside");

        // Changes of the node are seen at once: how ConfigMaps are updated.
        fs::write(&file, "changed\n")?;
        fs::write(format!("{directory}/later"), "later\n")?;
        assert_eq!(container.shell("cat /ro/key /rw/later").await?, "changed\nlater");

        for command in ["echo x > /ro/key", "rm /ro/key", "touch /ro/other", "echo x > /etc/single"] {
            let output = container.exec(["sh", "-c", command]).await?;
            assert!(
                output.exit_code != 0 && output.stderr.contains("Read-only file system"),
                "{command}: {output:?}"
            );
        }
        assert_eq!(fs::read_to_string(&file)?, "changed\n");
        Ok(())
    })
}

#[test]
fn containers_of_a_pod_can_share_a_volume() -> Result<()> {
    on_node(async |node| {
        let file = node.file("shared/seed", "")?;
        let directory = file.trim_end_matches("/seed");
        let pod = node.pod("two").run().await?;
        let writer = pod.container("writer").mount(directory, "/out", false).start().await?;
        let reader = pod.container("reader").mount(directory, "/in", true).start().await?;
        writer.shell("seq 100000 > /out/numbers; mv /out/numbers /out/done").await?;
        assert_eq!(reader.shell("tail -n 1 /in/done").await?, "100000");
        Ok(())
    })
}
