//! Pods with a user namespace: who is who in them, and what their root may do.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chown},
};

use anyhow::Result;
use pericarp_tests::{ContainerBuilder, POD_ROOT, PodBuilder, api, with_mapped_ids};

use super::{case, compare, storage::MemoryEmptyDirs};

/// Prints the owners of files of the image, of the kernel and of the container, and tries what root may do in its own
/// namespaces.
const TELL: &str = "
    cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; id
    cd /odd; stat -c '%n %F %a %u:%g' * | sort; cat owned unreadable; ./setuid
    touch /new; mkdir /made; touch /made/roots; mv /made/roots /made/moved; ln /made/moved /made/linked; rm /etc/group
    chown 1000:2000 /made/linked; chmod 4711 /made/linked; chown 70000 /new; chown 65535:65535 /made
    stat -c '%n %a %u:%g %h' /new /made /made/*
    stat -c '%n %u:%g' /proc/1 /proc/sys /sys /sys/kernel /sys/fs/cgroup/cgroup.procs /etc/resolv.conf
    touch /dev/shm/$PORT; stat -c %u:%g /dev/shm/$PORT; echo x > /etc/hosts; echo x > /dev/null
    ls -l /proc/self/fd/1 | wc -l
    ls /sys/class/net | grep -v sit; ping -c 1 -W 5 127.0.0.1 > /dev/null && echo ping
    (peer serve 127.0.0.1:$PORT > /dev/null &
     for i in 1 2 3 4 5 6 7 8 9; do sleep 1; peer tcp 127.0.0.1:$PORT sink 2> /dev/null && break; done)";

/// Tries operations that need privileges, in the pod's namespaces and outside of them.
const ADMINISTER: &str = "
    ip address add 192.0.2.7/32 dev lo; echo address $?; hostname other; echo hostname $?
    mkdir /p /s /m /c; mount -t tmpfs t /tmp; echo tmpfs $?; mount -t proc p /p; echo proc $?
    mount -t sysfs -o ro s /s; echo sysfs $?; mount -t mqueue m /m; echo mqueue $?
    mount -t cgroup2 c /c; echo cgroup $?
    mount -o bind /etc /home; echo bind $?; chroot / true; echo chroot $?
    mknod /node c 1 3; echo mknod $?; echo x > /proc/sys/kernel/core_pattern; echo core_pattern $?
    date -s 2020-01-01 > /dev/null; echo date $?; echo 0 > /proc/sys/net/ipv4/ip_forward; echo ip_forward $?
    echo 9 > /proc/sys/kernel/shm_rmid_forced; echo 1 > /proc/sys/kernel/shm_rmid_forced; echo shm_rmid_forced $?
    unshare -Ur id -u; echo unshare $?; nsenter -t 1 -u true; echo nsenter $?";

fn id(value: i64) -> api::Int64Value {
    api::Int64Value { value }
}

#[test]
fn a_user_namespace_looks_as_under_runc() -> Result<()> {
    compare(
        PodBuilder::in_user_namespace,
        &[
            case("root", TELL, |container, _| container.env("PORT", "80")),
            case("alice", TELL, |container, _| {
                container.env("PORT", "81").with_security(|security| security.run_as_user = Some(id(1000)))
            }),
            case("strict-groups", TELL, |container, _| {
                container.env("PORT", "82").with_security(|security| {
                    security.run_as_user = Some(id(54321));
                    security.run_as_group = Some(id(4242));
                    security.supplemental_groups = vec![5, 2000];
                    security.no_new_privs = true;
                })
            }),
            case("administrator", ADMINISTER, |container, _| {
                container.with_security(|security| {
                    security.capabilities = Some(api::Capability {
                        add_capabilities: vec!["ALL".to_owned()],
                        ..api::Capability::default()
                    });
                    security.seccomp = None;
                    security.masked_paths.clear();
                    security.readonly_paths.clear();
                })
            }),
            case("read-only", "touch /x /dev/shm/y /tmp/z", |container, _| {
                container.with_security(|security| security.readonly_rootfs = true)
            }),
            case(
                "missing-directory",
                "stat -c '%n %u:%g' /made /made/by /made/by/us; touch x",
                |container, _| container.with(|config| config.working_dir = "/made/by/us".to_owned()),
            ),
            case(
                "terminal",
                "tty; stat -c '%n %a %u:%g' /dev/console /dev/pts/0; echo > /dev/tty",
                |container, _| container.with(|config| config.tty = true),
            ),
        ],
    )
}

#[test]
fn a_user_namespaces_processes_and_sysctls_are_those_of_runc() -> Result<()> {
    compare(
        |pod| {
            pod.in_user_namespace()
                .with_namespaces(|namespaces| namespaces.pid = api::NamespaceMode::Pod.into())
                .with_linux(|linux| {
                    for (key, value) in [
                        ("net.ipv4.ip_unprivileged_port_start", "100"),
                        ("net.ipv4.ping_group_range", "0 1000"),
                        ("net.core.somaxconn", "1234"),
                        ("kernel.shm_rmid_forced", "1"),
                        ("kernel.msgmax", "4321"),
                        ("fs.mqueue.msg_max", "7"),
                    ] {
                        linux.sysctls.insert(key.to_owned(), value.to_owned());
                    }
                })
        },
        &[case(
            "shared",
            "[ $$ != 1 ] && echo not the first; stat -c %u:%g /proc/1 /proc/$$
             cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range \
                 /proc/sys/net/core/somaxconn /proc/sys/kernel/shm_rmid_forced /proc/sys/kernel/msgmax \
                 /proc/sys/fs/mqueue/msg_max",
            |container, _| container,
        )],
    )
}

/// Fills a volume with files of several owners, and a directory of another.
fn fill(directory: &str, owners: &[(&str, u32, u32, u32)]) -> io::Result<()> {
    for &(name, mode, uid, gid) in owners {
        let path = format!("{directory}/{name}");
        fs::write(&path, "content\n")?;
        chown(&path, Some(uid), Some(gid))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    let alices = format!("{directory}/alices-directory");
    fs::create_dir(&alices)?;
    chown(&alices, Some(1000), Some(1000))
}

#[test]
fn volumes_in_a_user_namespace_are_those_of_runc() -> Result<()> {
    let tries = "cd /volume
        for f in private alices groups public; do cat $f; echo x >> $f; chmod 777 $f; chown 7:7 $f; done
        for f in foreign mapped; do
          cat $f; echo x >> $f; chmod 777 $f 2> /dev/null; echo $?; chown 7:7 $f 2> /dev/null; echo $?
        done
        touch new && mkdir dir && touch dir/below && ln new hard && ln -s new soft && mkfifo fifo
        mv new renamed; mv dir moved; rm private; mv alices alices-directory; ln public alices-directory/link
        touch alices-directory/from-root; mkdir alices-directory/made; rm groups
        stat -c '%n %F %a %u:%g %s %h' . * */* | sort
        peer files /volume 2>&1 | head -n 100";
    let volume = |name, user: i64, on_disk: bool, with_map: bool| {
        case(name, tries, move |container: ContainerBuilder, place| {
            let directory = if on_disk { place.on_disk() } else { place.directory("volume") };
            fill(
                &directory,
                &[
                    ("private", 0o600, 0, 0),
                    ("alices", 0o640, 1000, 1000),
                    ("groups", 0o660, 0, 4242),
                    ("public", 0o644, 0, 0),
                    ("foreign", 0o644, 100_000, 100_000),
                    ("mapped", 0o644, POD_ROOT, POD_ROOT + 5),
                ],
            )
            .unwrap();
            let owner = if with_map { 0 } else { POD_ROOT };
            chown(&directory, Some(owner), Some(owner + 4242)).unwrap();
            // As kubelet prepares a volume for fsGroup.
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o2775)).unwrap();
            let mount = api::Mount {
                host_path: directory,
                container_path: "/volume".to_owned(),
                ..api::Mount::default()
            };
            let mount = if with_map { with_mapped_ids(mount) } else { mount };
            container.with(|config| config.mounts.push(mount)).with_security(|security| {
                security.run_as_user = Some(id(user));
                security.supplemental_groups = vec![4242];
            })
        })
    };
    compare(
        PodBuilder::in_user_namespace,
        &[
            volume("root-on-disk", 0, true, true),
            volume("root-in-memory", 0, false, true),
            volume("alice", 1000, true, true),
            volume("hosts-ids", 0, true, false),
            case(
                "read-only",
                "cat /v/key /f; echo x > /v/key; stat -c '%n %u:%g' /v /v/key /f",
                |container, place| {
                    let mount = |host_path, container_path: &str, readonly| {
                        let container_path = container_path.to_owned();
                        with_mapped_ids(api::Mount {
                            host_path,
                            container_path,
                            readonly,
                            ..api::Mount::default()
                        })
                    };
                    let mounts = vec![
                        mount(place.directory("v"), "/v", true),
                        mount(place.file("v/key", "k\n"), "/f", false),
                    ];
                    container.with(|config| config.mounts = mounts)
                },
            ),
        ],
    )
}

#[test]
fn volumes_in_memory_in_a_user_namespace_are_those_of_runc() -> Result<()> {
    let tries = "cd /volume; stat -c '%a %u:%g' .; touch new; mkdir dir; touch dir/below; chown 7:7 new; chown 70000 dir
        stat -c '%n %F %a %u:%g' * dir/* | sort; mknod node c 1 3; echo $?; mkdir files; peer files /volume/files";
    let volumes = MemoryEmptyDirs::default();
    let volume = |name, prepared, user: i64| {
        volumes.case(name, tries, prepared, move |container, mount| {
            let container = container.with(|config| config.mounts.push(with_mapped_ids(mount)));
            container.with_security(|security| {
                security.run_as_user = Some(id(user));
                security.supplemental_groups = vec![4242];
            })
        })
    };
    compare(
        PodBuilder::in_user_namespace,
        &[
            volume("root", (0o1777, 0, ""), 0),
            volume("group", (0o2777, 4242, ""), 1000),
            volume("part", (0o2777, 4242, "a/b"), 1000),
        ],
    )
}
