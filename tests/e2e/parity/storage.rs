//! Volumes, and what the file systems in them can do.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::rc::Rc;

use anyhow::Result;
use pericarp_tests::{ContainerBuilder, api, node::empty_dir::MemoryEmptyDir};

use super::{Case, CaseDirectory, case, compare};

/// A volume at a path of the container, with a file and a directory in it.
fn volume(place: &CaseDirectory, path: &str) -> api::Mount {
    let name = path.replace('/', "-");
    place.file(&format!("{name}/key"), &format!("{path}\n"));
    place.file(&format!("{name}/below/deep"), "deep\n");
    api::Mount { host_path: place.path(&name), container_path: path.to_owned(), ..api::Mount::default() }
}

fn file(place: &CaseDirectory, path: &str) -> api::Mount {
    let mut mount = volume(place, path);
    mount.host_path += "/key";
    mount
}

#[test]
fn volumes_look_as_under_runc() -> Result<()> {
    let script = "
        for place in /writable /read-only /second /a/b/c /tmp /odd; do
          echo [$place]; ls -A $place; cat $place/key; echo more >> $place/key; rm $place/below/deep
          touch $place/new; cat $place/key
        done
        for file in /etc/one /etc/two /etc/group /etc/hosts; do
          echo [$file]; cat $file; echo more >> $file; mv $file /etc/moved; rm $file; cat $file
        done
        stat -c '%n %a %u:%g' /a /a/b /etc/one; ls /odd /tmp /missing; cat /unclean/key /slash/key
        ls -A /dev/shm; touch /dev/shm/x && echo ok; ls /link-in-image/";
    compare(
        |pod| pod,
        &[
            case("volumes", script, |container: ContainerBuilder, place| {
                let mut mounts: Vec<_> =
                    ["/writable", "/read-only", "/second", "/a/b/c", "/tmp", "/odd", "/var/lib/data"]
                        .map(|path| volume(place, path))
                        .into();
                mounts[1].readonly = true;
                mounts.extend(
                    ["/etc/one", "/etc/two", "/etc/group", "/etc/hosts"].map(|path| file(place, path)),
                );
                mounts[8].readonly = true;
                let mut missing = volume(place, "/missing");
                missing.host_path += "/no/such";
                mounts.push(missing);
                for (path, written) in [("/unclean", "//unclean/./"), ("/slash", "/slash/")] {
                    mounts.push(api::Mount { container_path: written.to_owned(), ..volume(place, path) });
                }
                container.with(|config| config.mounts = mounts)
            }),
            case(
                "nested",
                "cat /v/key /v/below/key /v/below/deep; ls /v /v/below",
                |container: ContainerBuilder, place| {
                    // In the wrong order: the outer one is not to hide the inner.
                    let mounts = vec![volume(place, "/v/below"), volume(place, "/v")];
                    container.with(|config| config.mounts = mounts)
                },
            ),
        ],
    )
}

#[test]
fn ownership_and_modes_in_volumes_are_those_of_runc() -> Result<()> {
    let prepared = |name, script: &'static str, user: i64| {
        case(name, script, move |container: ContainerBuilder, place| {
            let directory = place.directory("volume");
            for (name, mode, owner) in [
                ("private", 0o600, (0, 0)),
                ("alices", 0o640, (1000, 1000)),
                ("groups", 0o660, (0, 4242)),
                ("public", 0o644, (0, 0)),
                ("setuid", 0o4755, (1000, 2000)),
            ] {
                let path = place.file(&format!("volume/{name}"), "content\n");
                chown(&path, Some(owner.0), Some(owner.1)).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            chown(&directory, Some(0), Some(4242)).unwrap();
            // As kubelet prepares a volume for fsGroup.
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o2775)).unwrap();
            container.mount(&directory, "/volume", false).with_security(|security| {
                security.run_as_user = Some(api::Int64Value { value: user });
                security.supplemental_groups = vec![4242];
            })
        })
    };
    let tries = "cd /volume
        for f in private alices groups public setuid; do cat $f; echo x >> $f; chmod 777 $f; chown 7:7 $f; done
        touch new && mkdir dir && touch dir/below && ln new hard && ln -s new soft && mkfifo fifo
        mv new renamed; rm private; rm groups
        stat -c '%n %F %a %u:%g %s %h' * dir/* | sort; cat setuid";
    compare(
        |pod| pod,
        &[prepared("root", tries, 0), prepared("alice", tries, 1000), prepared("other", tries, 4321)],
    )
}

/// Tries the operations of file systems, each in a directory of its own.
const ABILITIES: &[(&str, &str)] = &[
    ("links", "touch a; for i in $(seq 20); do ln a l$i; done; stat -c %h a; rm l1*; stat -c %h a"),
    (
        "sparse",
        "dd if=/dev/zero of=s bs=1 count=1 seek=100M 2> /dev/null; stat -c %s s
         [ $(du -k s | cut -f 1) -lt 1000 ] && echo sparse; truncate -s 5 s; stat -c %s s",
    ),
    (
        "renames",
        "mkdir a b; touch a/x; mv a/x b/y; mv b c; ls c
         mkdir full; touch full/x; mkdir e; mv -T e full; rmdir full; echo $?",
    ),
    ("append", "for i in 1 2 3 4; do (for j in $(seq 20); do echo $i$j >> log; done) & done; wait; wc -l < log"),
    ("unlinked", "exec 3<> x; echo kept >&3; rm x; ls; cat /proc/self/fd/3"),
    (
        "names",
        "touch 'a b' ./-n \"$(printf 'new\\nline')\" \u{fc}; ls -A | wc -l
         touch $(printf 'x%.0s' $(seq 255)) && echo long; touch $(printf 'x%.0s' $(seq 256))",
    ),
    (
        "times",
        "touch -d '2001-02-03 04:05:06' t; stat -c '%Y %X' t
         mkdir d; touch -d '2001-02-03 04:05:06' d; touch d/x; [ $(stat -c %Y d) -gt 1000000000 ] && echo newer",
    ),
    ("lock", "touch l; flock -n l sh -c 'flock -n l true; echo $?'; flock -n l true; echo $?"),
    ("copy", "cp -a /odd o; cd o; stat -c '%n %F %a %u:%g' * | sort"),
    ("loops", "ln -s self self; cat self; mkdir -p $(printf 'd/%.0s' $(seq 60)); find . | wc -l"),
    ("statfs", "df -P . | tail -n 1 | awk '{ print NF, ($2 > 0), ($4 > 0) }'"),
    ("fifo", "mkfifo f && (echo through > f &) && cat f; mknod p p && [ -p p ] && echo made; mknod w c 0 0; echo $?"),
];

/// A script that tries all of [`ABILITIES`] in a directory.
fn in_each(place: &str) -> String {
    let steps = ABILITIES
        .iter()
        .map(|(name, script)| format!("\necho [{name}]; mkdir {name}; (cd {name}; {script})"));
    format!("cd {place}{}", steps.collect::<String>())
}

#[test]
fn file_systems_can_do_what_they_can_under_runc() -> Result<()> {
    let (volume, root) = (in_each("/volume"), in_each("/root"));
    compare(
        |pod| pod,
        &[
            case("in-a-volume", volume, |container: ContainerBuilder, place| {
                container.mount(&place.directory("volume"), "/volume", false)
            }),
            case("in-the-root", root, |container, _| container),
            // On the node's disk: its /run, where the other volumes are, is a tmpfs.
            case("on-a-disk", "peer files /volume", |container: ContainerBuilder, place| {
                container.mount(&place.on_disk(), "/volume", false)
            }),
            case(
                "over-the-image",
                "echo x >> /etc/passwd; chmod 600 /etc/group; chown 5:5 /odd/owned
                 stat -c '%n %a %u:%g %s' /etc/passwd /etc/group /odd/owned; cat /odd/hard-link
                 rm -r /odd; ls -d /odd; mkdir /odd; ls -A /odd
                 rm /etc/replaced; touch /etc/replaced; cat /etc/replaced
                 mv /home /home2; ls -d /home /home2
                 dd if=/dev/zero of=/dev/shm/x bs=1M count=65 2>&1 | tail -n 1 | cut -d ' ' -f 1
                 stat -c %s /dev/shm/x; df -P /dev/shm | tail -n 1 | awk '{ print $2 }'",
                |container, _| container,
            ),
        ],
    )
}

/// The emptyDirs in memory of all cases of a comparison. They are mounted until this is dropped.
#[derive(Clone, Default)]
pub struct MemoryEmptyDirs(Rc<RefCell<Vec<MemoryEmptyDir>>>);

#[expect(clippy::unwrap_used, reason = "nothing else writes there: an error is a fault of the test")]
impl MemoryEmptyDirs {
    /// A case with an emptyDir in memory at `/volume`, or with the directory `sub_path` of it if that is not empty.
    /// `mode` and `group` are the volume's, and `change` is made to the mount.
    pub fn case(
        &self,
        name: &'static str,
        script: impl Into<String>,
        (mode, group, sub_path): (u32, u32, &'static str),
        change: impl Fn(ContainerBuilder, api::Mount) -> ContainerBuilder + 'static,
    ) -> Case {
        let volumes = self.clone();
        case(name, script, move |container, place| {
            let mut volume = MemoryEmptyDir::new(&place.on_disk(), &container.pod_uid(), name, "8m").unwrap();
            chown(volume.path(), Some(0), Some(group)).unwrap();
            fs::set_permissions(volume.path(), fs::Permissions::from_mode(mode)).unwrap();
            let host_path =
                if sub_path.is_empty() { volume.path() } else { volume.sub_path(name, 0, sub_path).unwrap() };
            volumes.0.borrow_mut().push(volume);
            let container_path = "/volume".to_owned();
            change(container, api::Mount { host_path, container_path, ..api::Mount::default() })
        })
    }
}

#[test]
fn volumes_in_memory_are_those_of_runc() -> Result<()> {
    let tries = "cd /volume || exit 0; stat -c '%a %u:%g' .; stat -f -c %T .
        touch new && mkdir dir && touch dir/below && ln new hard && ln -s new soft && mkfifo fifo && mknod node c 1 3
        chmod 600 hard; chown 7:7 dir; stat -c '%n %F %a %u:%g %s %h' * dir/* | sort
        df -Pk . | tail -n 1 | awk '{ print $2 }'
        dd if=/dev/zero of=large bs=1M count=9 2>&1 | tail -n 1 | cut -d ' ' -f 1
        stat -c %s large; rm large";
    let volumes = MemoryEmptyDirs::default();
    let add = |container: ContainerBuilder, mount| container.with(|config| config.mounts.push(mount));
    compare(
        |pod| pod,
        &[
            volumes.case("root", tries, (0o1777, 0, ""), add),
            volumes.case("group", tries, (0o2777, 4242, ""), move |container, mount| {
                add(container, mount).with_security(|security| {
                    security.run_as_user = Some(api::Int64Value { value: 1000 });
                    security.supplemental_groups = vec![4242];
                })
            }),
            volumes.case("private", tries, (0o700, 0, ""), move |container, mount| {
                add(container, mount)
                    .with_security(|security| security.run_as_user = Some(api::Int64Value { value: 1000 }))
            }),
            volumes.case("part", tries, (0o2777, 4242, "a/b c"), add),
            volumes.case("read-only", tries, (0o1777, 0, ""), move |container, mount| {
                add(container, api::Mount { readonly: true, ..mount })
            }),
            volumes.case("abilities", in_each("/volume"), (0o1777, 0, ""), add),
            volumes.case("files", "peer files /volume", (0o1777, 0, "empty"), add),
        ],
    )
}
