//! Users, privileges, environment and limits of a container's process.

use std::fs;

use anyhow::Result;
use pericarp_tests::{ContainerBuilder, PodBuilder, api};

use super::{Case, case, compare};

type Security = api::LinuxContainerSecurityContext;

fn secured(name: &'static str, script: impl Into<String>, change: impl Fn(&mut Security) + 'static) -> Case {
    case(name, script, move |container: ContainerBuilder, _| container.with_security(&change))
}

fn id(value: i64) -> api::Int64Value {
    api::Int64Value { value }
}

fn capabilities(add: &[&str], drop: &[&str], ambient: &[&str]) -> api::Capability {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    api::Capability {
        add_capabilities: names(add),
        drop_capabilities: names(drop),
        add_ambient_capabilities: names(ambient),
    }
}

fn profile(kind: api::security_profile::ProfileType, localhost: &str) -> api::SecurityProfile {
    api::SecurityProfile { profile_type: kind.into(), localhost_ref: localhost.to_owned() }
}

#[test]
fn users_and_groups_are_those_of_runc() -> Result<()> {
    compare(
        |pod| pod,
        &[
            case("ordinary", "", |container, _| container),
            secured("user", "touch /home /tmp/mine; stat -c %u:%g /tmp/mine", |security| {
                security.run_as_user = Some(id(1000));
            }),
            secured("user-without-an-entry", "echo $HOME", |security| {
                security.run_as_user = Some(id(54321));
                security.run_as_group = Some(id(0));
                security.supplemental_groups = vec![4242, 5, 100_000];
            }),
            secured("user-by-name", "", |security| security.run_as_username = "alice".to_owned()),
            secured("missing-user", "", |security| security.run_as_username = "nobody-knows".to_owned())
                .refused(),
            secured("strict-groups", "", |security| {
                security.run_as_user = Some(id(1000));
                security.run_as_group = Some(id(1000));
                security.supplemental_groups = vec![4242];
                security.supplemental_groups_policy = api::SupplementalGroupsPolicy::Strict.into();
            }),
            secured("read-only-root", "touch /etc/new /dev/shm/x /dev/new /tmp/y", |security| {
                security.readonly_rootfs = true;
                security.masked_paths.clear();
                security.readonly_paths.clear();
            }),
            secured("masked", "cat /etc/passwd; ls /home /tmp; ls /sys/firmware", |security| {
                security.masked_paths =
                    ["/etc/passwd", "/home", "/sys/firmware", "/no/such"].map(str::to_owned).into();
                security.readonly_paths = ["/proc/fs", "/no/such"].map(str::to_owned).into();
            }),
        ],
    )
}

#[test]
fn capabilities_and_privileges_are_those_of_runc() -> Result<()> {
    let bits = "grep -E '^(Cap|NoNew|Seccomp)' /proc/self/status; mount -t tmpfs x /tmp && echo mounted";
    compare(
        |pod| pod.with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true),
        &[
            secured("added-and-dropped", format!("{bits}; chown 1:1 /tmp; kill -0 1"), |security| {
                security.capabilities =
                    Some(capabilities(&["SYS_ADMIN", "NET_ADMIN"], &["CHOWN", "KILL"], &[]));
            }),
            secured("all-added", "", |security| {
                security.capabilities = Some(capabilities(&["ALL"], &[], &[]));
            }),
            secured("all-dropped", "ping -c 1 127.0.0.1 > /dev/null && echo ping", |security| {
                security.capabilities = Some(capabilities(&[], &["ALL"], &[]));
            }),
            secured("all-but-one", "", |security| {
                security.capabilities = Some(capabilities(&["NET_BIND_SERVICE"], &["ALL"], &[]));
            }),
            secured("for-a-user", "", |security| {
                security.run_as_user = Some(id(1000));
                security.capabilities = Some(capabilities(&["NET_RAW"], &[], &[]));
            }),
            secured("ambient", "su alice -c 'grep Cap /proc/self/status'", |security| {
                security.run_as_user = Some(id(1000));
                security.capabilities =
                    Some(capabilities(&["NET_RAW", "SYS_TIME"], &[], &["NET_RAW", "SYS_TIME"]));
            }),
            secured("unknown", "", |security| {
                security.capabilities = Some(capabilities(&["NO_SUCH_THING"], &[], &[]));
            }),
            secured("no-new-privileges", "su alice -c id; ls -l /bin/su", |security| {
                security.run_as_user = Some(id(1000));
                security.no_new_privs = true;
            }),
        ],
    )
}

/// Operations that a container must not do, each with the system call that a profile stops.
const FORBIDDEN: &str = "
unshare -U true; echo unshare $?
mount -t tmpfs x /tmp; echo mount $?
chroot / true; echo chroot $?
chmod 600 /etc/passwd; echo chmod $?
mkdir /tmp/d; echo mkdir $?
hostname new; echo sethostname $?
";

#[test]
fn seccomp_profiles_stop_the_same_calls_as_under_runc() -> Result<()> {
    use api::security_profile::ProfileType;
    let directory = "/run/pericarp-test-profiles";
    fs::create_dir_all(directory)?;
    let local = |name: &'static str, rules: &str| -> Result<Case> {
        let path = format!("{directory}/{name}.json");
        let architectures = r#"["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"]"#;
        let written = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","architectures":{architectures},"syscalls":[{rules}]}}"#
        );
        fs::write(&path, written)?;
        Ok(secured(name, FORBIDDEN, move |security| {
            security.seccomp = Some(profile(ProfileType::Localhost, &path));
        }))
    };
    compare(
        |pod| pod,
        &[
            secured("default", FORBIDDEN, |security| {
                security.capabilities = Some(capabilities(&["SYS_ADMIN"], &[], &[]));
                security.seccomp = Some(profile(ProfileType::RuntimeDefault, ""));
            }),
            secured("default-without-new-privileges", FORBIDDEN, |security| {
                security.run_as_user = Some(id(1000));
                security.no_new_privs = true;
                security.seccomp = Some(profile(ProfileType::RuntimeDefault, ""));
            }),
            secured("unconfined", FORBIDDEN, |security| {
                security.seccomp = Some(profile(ProfileType::Unconfined, ""));
            }),
            local(
                "denied",
                r#"{"names":["chmod","fchmod","fchmodat","fchmodat2"],"action":"SCMP_ACT_ERRNO"},
                   {"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28},
                   {"names":["chroot"],"action":"SCMP_ACT_LOG"}"#,
            )?,
            local("killed", r#"{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_KILL_PROCESS"}"#)?,
            local("trapped", r#"{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_TRAP"}"#)?,
            secured("missing-profile", "", |security| {
                security.seccomp = Some(profile(ProfileType::Localhost, "/no/such/profile.json"));
            })
            .refused(),
        ],
    )
}

#[test]
fn a_privileged_container_may_do_what_it_may_under_runc() -> Result<()> {
    let privileged = |pod: PodBuilder| {
        pod.with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
    };
    let script = "
        grep -E '^(Cap|Seccomp:)' /proc/self/status
        mount -t tmpfs x /tmp && touch /tmp/y && echo mounted
        mknod /tmp/null c 1 3 && echo x > /tmp/null && umount /tmp && echo node
        mkdir /sys/fs/cgroup/inner && echo cgroup made; rmdir /sys/fs/cgroup/inner
        echo 1 > /proc/sys/net/ipv4/ip_forward && echo sysctl
        hostname parity && hostname
        unshare -Urm true && echo unshared
        chroot / true && echo chrooted";
    // Its devices are the machine's, and runc's the whole host's, so there is no portrait to compare.
    compare(
        privileged,
        &[case("privileged", "", move |container, _| {
            container.script(script).with_security(|security| {
                security.privileged = true;
                security.seccomp = None;
                security.masked_paths.clear();
                security.readonly_paths.clear();
            })
        })],
    )
}

#[test]
fn commands_and_environments_mean_the_same_as_under_runc() -> Result<()> {
    compare(
        |pod| pod,
        &[
            case("environment", "", |container, _| {
                container
                    .env("EMPTY", "")
                    .env("SPACES", " a  b ")
                    .env("UTF", "\u{fc}\u{4e2d}")
                    .env("FROM_IMAGE", "replaced")
            }),
            case("new-directory", "pwd; stat -c '%a %u:%g' .", |container, _| {
                container.with(|config| config.working_dir = "/made/for/this".into())
            }),
            case("new-directory-for-a-user", "pwd; stat -c '%a %u:%g' .", |container, _| {
                container
                    .with(|config| config.working_dir = "/made/for/alice".into())
                    .with_security(|security| security.run_as_user = Some(id(1000)))
            }),
            case("missing-command", "", |container, _| container.command(["no-such-command"])).refused(),
            case("missing-path", "", |container, _| container.command(["/no/such/command"])).refused(),
            case("not-executable", "", |container, _| container.command(["/etc/passwd"])).refused(),
            case("a-directory", "", |container, _| container.command(["/etc"])).refused(),
            case("no-interpreter", "", |container, _| {
                container.command(["sh", "-c", "printf '#!/no/such\n' > /x; chmod +x /x; /x"])
            }),
            case("exit-code", "exit 42", |container, _| container),
            case("segfault", "kill -SEGV $$", |container, _| container),
            case("arguments", "", |container, _| {
                container.with(|config| {
                    config.command = vec!["printf".into(), "<%s>\n".into()];
                    config.args = ["", "a b", "$HOME", "\u{fc}", "'"].map(str::to_owned).into();
                })
            }),
            case("terminal", "tty; stty size; test -t 0 -a -t 1 -a -t 2 && echo all", |container, _| {
                container.with(|config| {
                    config.tty = true;
                    config.stdin = true;
                })
            }),
        ],
    )
}

#[test]
fn a_shared_pid_namespace_shows_the_same_as_under_runc() -> Result<()> {
    compare(
        |pod| pod.with_namespaces(|namespaces| namespaces.pid = api::NamespaceMode::Pod.into()),
        &[
            case(
                "pod",
                "[ $$ != 1 ] && echo not the first; sed 's/NSpid.*//' /proc/1/comm | wc -l",
                |container, _| container,
            ),
            case("own", "echo $$", |container, _| {
                container.with_security(|security| {
                    security.namespace_options.get_or_insert_default().pid =
                        api::NamespaceMode::Container.into();
                })
            }),
        ],
    )
}
