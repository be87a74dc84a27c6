//! Privileges and profiles, each of which is tried from outside by a command in the container.

use std::fs;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use pericarp_tests::{ExecOutput, api, on_node};

type Security = api::LinuxContainerSecurityContext;

/// A container that differs from a minimal one in one thing, and what a command in it does.
struct Case {
    name: &'static str,
    change: Box<dyn Fn(&mut Security)>,
    command: [&'static str; 3],
    /// The exit code of the command and its output.
    expected: (i32, &'static str, &'static str),
}

fn case(
    name: &'static str,
    change: impl Fn(&mut Security) + 'static,
    script: &'static str,
    expected: (i32, &'static str, &'static str),
) -> Case {
    Case { name, change: Box::new(change), command: ["sh", "-c", script], expected }
}

fn capabilities(add: &[&str], drop: &[&str]) -> api::Capability {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    api::Capability { add_capabilities: names(add), drop_capabilities: names(drop), ..Default::default() }
}

fn profile(kind: api::security_profile::ProfileType, localhost: &str) -> api::SecurityProfile {
    api::SecurityProfile { profile_type: kind.into(), localhost_ref: localhost.to_owned() }
}

fn cases() -> Result<Vec<Case>> {
    use api::security_profile::ProfileType::{Localhost, Unconfined};
    let directory = "/run/pericarp-test-profiles";
    fs::create_dir_all(directory)?;
    // Without architectures, unlike what containerd makes by itself.
    let blocking = |name: &str, calls: &str| -> Result<String> {
        let path = format!("{directory}/{name}.json");
        let rules = format!(r#"{{"names":[{calls}],"action":"SCMP_ACT_ERRNO"}}"#);
        fs::write(&path, format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rules}]}}"#))?;
        Ok(path)
    };
    let no_host_name = blocking("block-host-name", r#""sethostname""#)?;
    let (no_host_name_privileged, no_chmod) =
        (no_host_name.clone(), blocking("block-chmod", r#""chmod","fchmodat""#)?);
    Ok(vec![
        case("default", |_| {}, "brctl addbr foobar", (1, "", "Operation not permitted")),
        case(
            "net-admin",
            |security| security.capabilities = Some(capabilities(&["NET_ADMIN"], &[])),
            "brctl addbr critest0 && echo added",
            (0, "added\n", ""),
        ),
        case(
            "privileged",
            |security| security.privileged = true,
            "brctl addbr critest1 && echo added",
            (0, "added\n", ""),
        ),
        case(
            "masked",
            |security| security.masked_paths = vec!["/bin/peer".to_owned()],
            "peer",
            (127, "", "peer: Permission denied\n"),
        ),
        case(
            "read-only-path",
            |security| security.readonly_paths = vec!["/tmp".to_owned()],
            "touch /tmp/test",
            (1, "", "touch: /tmp/test: Read-only file system\n"),
        ),
        case(
            "default-profile",
            |security| security.seccomp = Some(api::SecurityProfile::default()),
            "grep ^Seccomp: /proc/self/status",
            (0, "Seccomp:\t2\n", ""),
        ),
        case(
            "no-chmod",
            move |security| security.seccomp = Some(profile(Localhost, &no_chmod)),
            "chmod 400 /",
            (1, "", "Operation not permitted"),
        ),
        case(
            "no-host-name",
            move |security| {
                security.seccomp = Some(profile(Localhost, &no_host_name));
                security.capabilities = Some(capabilities(&["SYS_ADMIN"], &[]));
            },
            "hostname blocked",
            (1, "", "Operation not permitted"),
        ),
        case(
            "unconfined",
            |security| {
                security.seccomp = Some(profile(Unconfined, ""));
                security.capabilities = Some(capabilities(&["SYS_ADMIN"], &[]));
            },
            "hostname anew && hostname",
            (0, "anew\n", ""),
        ),
        // The profile of a privileged container is passed over.
        case(
            "privileged-with-a-profile",
            move |security| {
                security.privileged = true;
                security.seccomp = Some(profile(Localhost, &no_host_name_privileged));
            },
            "hostname anew && hostname",
            (0, "anew\n", ""),
        ),
        case(
            "groups",
            |security| security.supplemental_groups = vec![1234, 5678],
            "id -G",
            (0, "0 1234 5678\n", ""),
        ),
    ])
}

#[test]
fn privileges_and_profiles_are_those_that_were_asked_for() -> Result<()> {
    let cases = cases()?;
    on_node(async |node| {
        let pod = node.pod("security").minimal();
        let pod = pod.with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true);
        let pod = pod.run().await?;
        let runs = stream::iter(&cases).map(async |case| {
            let container = pod.container(case.name).minimal().with_security(&case.change).start().await?;
            let output = container.exec(case.command).await?;
            anyhow::Ok((case, output))
        });
        let outputs: Vec<_> = runs.buffered(4).try_collect().await.context("run the cases")?;
        for (case, output) in outputs {
            let (exit_code, stdout, stderr) = case.expected;
            let ExecOutput { stdout: out, stderr: err, exit_code: code } = &output;
            assert!(
                *code == exit_code && out == stdout && err.contains(stderr),
                "{}: {output:?} instead of {:?}",
                case.name,
                case.expected
            );
        }
        Ok(())
    })
}
