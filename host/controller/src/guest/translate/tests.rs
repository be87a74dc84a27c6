use serde_json::json;

use super::*;
use crate::host::share::volume::{IdMapping, Propagation, ReadOnly};
use crate::host::user_namespace::IdRange;

const ID: &str = "c1";

pub(super) fn id() -> ContainerId {
    ID.parse().unwrap()
}

pub(super) const POD: Pod = Pod {
    machine_pid: 4711,
    id_map: None,
    huge_directory: |_| None,
    uid: String::new(),
    memory_empty_dir: |_, _| Ok(None),
};

/// The shape of what CRI in containerd 2.1 makes.
pub(super) fn spec() -> Value {
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "args": ["sh"], "cwd": "/", "oomScoreAdj": 1000,
            "apparmorProfile": "cri-containerd.apparmor.d",
            "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
            { "destination": "/data", "type": "bind", "source": "/var/lib/data",
                "options": ["rbind", "rprivate", "rw"] },
        ],
        "hooks": {},
        "linux": {
            "cgroupsPath": "/kubepods/c1",
            "mountLabel": "system_u:object_r:container_file_t:s0",
            "resources": { "cpu": { "shares": 2, "cpus": "6-7", "mems": "1" },
                "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" },
                { "type": "ipc", "path": "/proc/4711/ns/ipc" },
                { "type": "uts", "path": "/proc/4711/ns/uts" },
                { "type": "mount" },
                { "type": "network", "path": "/proc/4711/ns/net" },
                { "type": "cgroup" },
            ],
            "seccomp": { "defaultAction": "SCMP_ACT_ERRNO" },
        },
    })
}

fn run(spec: &Value) -> Result<(Value, Vec<Volume>), Error> {
    let translated = translate(&serde_json::to_vec(spec).unwrap(), &id(), &POD, None)?;
    Ok((serde_json::from_slice(&translated.spec).unwrap(), translated.volumes))
}

fn changed(change: impl FnOnce(&mut Value)) -> Result<(Value, Vec<Volume>), Error> {
    let mut spec = spec();
    change(&mut spec);
    run(&spec)
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Value), named: &str) {
    let error = changed(change).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    assert!(error.to_string().contains(named), "{error}");
}

fn mount<'a>(spec: &'a Value, destination: &str) -> Option<&'a Value> {
    spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == destination)
}

pub(super) fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn root_and_cgroup_are_the_guests() {
    let (spec, _) = run(&spec()).unwrap();
    assert_eq!(spec["root"]["path"], "/run/pericarp/share/c1/rootfs");
    assert_eq!(spec["linux"]["cgroupsPath"], "/pod/c1");
}

#[test]
fn unknown_fields_are_refused_and_seccomp_is_kept() {
    refused(|spec| spec["process"]["futureField"] = json!({ "wanted": true }), "process.futureField");
    let (spec, _) = run(&spec()).unwrap();
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
}

#[test]
fn the_pods_namespaces_are_the_guests_own() {
    let (spec, _) = run(&spec()).unwrap();
    assert_eq!(
        spec["linux"]["namespaces"],
        json!([{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }])
    );
}

#[test]
fn a_pid_namespace_of_the_pod_is_made_by_the_agent() {
    let (spec, _) = changed(|spec| {
        spec["linux"]["namespaces"] = json!([{ "type": "pid", "path": "/proc/4711/ns/pid" }]);
    })
    .unwrap();
    assert_eq!(spec["linux"]["namespaces"], json!([{ "type": "pid", "path": PID_NAMESPACE }]));
}

#[test]
fn a_target_containers_pid_namespace_is_named_by_its_pid_in_the_guest() {
    let target = json!([{ "type": "pid", "path": "/proc/77/ns/pid" }]);
    let (spec, _) = changed(|spec| spec["linux"]["namespaces"] = target.clone()).unwrap();
    assert_eq!(spec["linux"]["namespaces"], target);
}

#[test]
fn namespaces_of_the_host_are_refused() {
    for (kind, path) in [("pid", "/run/netns/x"), ("pid", "/proc/1/../2/ns/pid"), ("mount", "/proc/1/ns/mnt")]
    {
        refused(|spec| spec["linux"]["namespaces"] = json!([{ "type": kind, "path": path }]), kind);
    }
    refused(|spec| spec["linux"]["namespaces"] = json!([{ "type": "user" }]), "user namespace");
    refused(|spec| spec["linux"]["uidMappings"] = mappings(), "user namespace");
}

#[test]
fn hooks_are_refused_by_name() {
    refused(|spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/x" }] }), "createRuntime");
    assert!(changed(|spec| spec["hooks"] = json!({ "prestart": [] })).is_ok());
}

#[test]
fn default_security_labels_are_dropped() {
    let (spec, _) = run(&spec()).unwrap();
    assert!(spec["process"].get("apparmorProfile").is_none());
    assert!(spec["process"].get("selinuxLabel").is_none());
    assert!(spec["linux"].get("mountLabel").is_none());
}

#[test]
fn chosen_security_labels_are_refused() {
    refused(|spec| spec["process"]["apparmorProfile"] = json!("mine"), "\"mine\"");
    refused(|spec| spec["process"]["selinuxLabel"] = json!("u:r:mine_t:s0"), "mine_t");
}

#[test]
fn the_hosts_cpu_numbers_are_dropped() {
    let (spec, _) = run(&spec()).unwrap();
    assert_eq!(spec["linux"]["resources"]["cpu"], json!({ "shares": 2 }));
}

#[test]
fn huge_pages_of_another_size_are_refused_and_their_absence_is_not() {
    let limits =
        |bytes: u64| json!([{ "pageSize": "2MB", "limit": 0 }, { "pageSize": "1GB", "limit": bytes }]);
    changed(|spec| spec["linux"]["resources"]["hugepageLimits"] = limits(0)).unwrap();
    refused(|spec| spec["linux"]["resources"]["hugepageLimits"] = limits(1 << 30), "hugepages-2Mi");
}

#[test]
fn a_directory_of_huge_pages_is_the_guests_own() {
    let find =
        |path: &Path| (path == "/var/lib/data").then_some(HugeDirectory { mode: 0o2775, uid: 0, gid: 1000 });
    let mut spec = spec();
    let text = serde_json::to_vec(&spec).unwrap();
    assert_eq!(
        translate(&text, &id(), &Pod { huge_directory: find, ..POD }, None).unwrap().volumes.len(),
        1,
        "without huge pages"
    );
    spec["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": "2MB", "limit": 4_194_304 }]);
    let translated =
        translate(&serde_json::to_vec(&spec).unwrap(), &id(), &Pod { huge_directory: find, ..POD }, None)
            .unwrap();
    assert_eq!(translated.volumes, []);
    let spec = serde_json::from_slice(&translated.spec).unwrap();
    let mounted = mount(&spec, "/data").unwrap();
    assert_eq!(mounted["type"], "hugetlbfs");
    assert_eq!(mounted["options"], json!(["pagesize=2M", "mode=2775", "uid=0", "gid=1000"]));
}

#[test]
fn a_bind_mount_becomes_a_volume_in_the_share() {
    let (spec, volumes) = run(&spec()).unwrap();
    let data = mount(&spec, "/data").unwrap();
    let place = format!("/run/pericarp/share/.volumes/{}", volumes[0].name);
    assert_eq!(data["source"], place);
    assert_eq!(data["options"], json!(["rbind", "rprivate", "rw"]));
    assert_eq!(
        volumes,
        [Volume {
            name: volumes[0].name.clone(),
            source: "/var/lib/data".into(),
            destination: "/data".into(),
            recursive: true,
            read_only: ReadOnly::No,
            propagation: Propagation::Private,
            ids: IdMapping::Host,
        }]
    );
}

#[test]
fn volumes_come_in_the_order_of_their_mounts() {
    let (spec, volumes) = changed(|spec| {
        add_mount(spec, json!({ "destination": "/b", "source": "/hb", "options": ["bind"] }));
    })
    .unwrap();
    let place = format!("/run/pericarp/share/.volumes/{}", volumes[1].name);
    assert_eq!(mount(&spec, "/b").unwrap()["source"], place);
    assert!(!volumes[1].recursive);
}

#[test]
fn read_only_and_propagation_are_read_from_the_options() {
    for (options, read_only, propagation) in [
        (json!(["rbind", "ro"]), ReadOnly::Top, Propagation::Private),
        (json!(["rbind", "rro"]), ReadOnly::Recursive, Propagation::Private),
        (json!(["rbind", "ro", "rw", "rslave"]), ReadOnly::No, Propagation::Slave),
    ] {
        let (_, volumes) = changed(|spec| {
            add_mount(
                spec,
                json!({ "destination": "/b", "type": "bind", "source": "/hb", "options": options }),
            );
        })
        .unwrap();
        assert_eq!((volumes[1].read_only, volumes[1].propagation), (read_only, propagation));
    }
}

#[test]
fn a_read_only_volume_with_mounts_below_it_is_read_only_on_the_host_alone() {
    // Below / there are always some.
    let (spec, volumes) = changed(|spec| {
        for (destination, source) in [("/tree", "/"), ("/leaf", "/no/such/source")] {
            let options = json!(["rbind", "rprivate", "ro"]);
            add_mount(
                spec,
                json!({ "destination": destination, "type": "bind", "source": source, "options": options }),
            );
        }
    })
    .unwrap();
    assert_eq!((volumes[1].read_only, volumes[2].read_only), (ReadOnly::TopOfTree, ReadOnly::Top));
    assert_eq!(mount(&spec, "/tree").unwrap()["options"], json!(["rbind", "rprivate"]));
    assert_eq!(mount(&spec, "/leaf").unwrap()["options"], json!(["rbind", "rprivate", "ro"]));
    // A container that may write has it under another name, so this one stays as it is.
    let (_, others) = changed(|spec| {
        add_mount(
            spec,
            json!({ "destination": "/tree", "type": "bind", "source": "/", "options": ["rbind"] }),
        );
    })
    .unwrap();
    assert_ne!(volumes[1].name, others[1].name);
}

#[test]
fn mounts_that_would_have_to_reach_the_host_are_refused() {
    refused(
        |spec| {
            let options = json!(["rbind", "rshared"]);
            add_mount(
                spec,
                json!({ "destination": "/b", "type": "bind", "source": "/hb", "options": options }),
            );
        },
        "bidirectional",
    );
    refused(|spec| spec["linux"]["rootfsPropagation"] = json!("rshared"), "bidirectional");
}

#[test]
fn a_relative_bind_source_is_malformed() {
    let result =
        changed(|spec| add_mount(spec, json!({ "destination": "/b", "type": "bind", "source": "x" })));
    assert!(matches!(result, Err(Error::Malformed(_))));
}

#[test]
fn foreign_file_systems_are_refused() {
    refused(|spec| add_mount(spec, json!({ "destination": "/n", "type": "nfs", "source": "s:/x" })), "nfs");
}

#[test]
fn the_kernels_file_systems_stay_as_they_are() {
    let (translated, _) = run(&spec()).unwrap();
    for destination in ["/proc", "/dev", "/sys/fs/cgroup"] {
        assert_eq!(mount(&translated, destination), mount(&spec(), destination));
    }
}

#[test]
fn the_pods_files_are_mounted() {
    let (spec, _) = run(&spec()).unwrap();
    assert_eq!(mount(&spec, "/etc/hosts").unwrap()["source"], "/run/pericarp/etc/hosts");
    assert_eq!(mount(&spec, "/etc/resolv.conf").unwrap()["source"], "/run/pericarp/etc/resolv.conf");
    assert_eq!(mount(&spec, "/etc/hostname").unwrap()["options"], json!(["rbind", "rprivate", "rw"]));
    assert_eq!(mount(&spec, "/dev/shm").unwrap()["source"], "/run/pericarp/shm");
}

#[test]
fn the_pods_files_are_read_only_in_a_read_only_root() {
    let (spec, _) = changed(|spec| spec["root"]["readonly"] = json!(true)).unwrap();
    assert_eq!(mount(&spec, "/etc/hosts").unwrap()["options"], json!(["rbind", "rprivate", "ro"]));
}

#[test]
fn a_volume_at_a_pod_files_place_wins() {
    let (spec, volumes) = changed(|spec| {
        for destination in ["/etc//hosts/", "/dev/shm"] {
            add_mount(
                spec,
                json!({ "destination": destination, "type": "bind", "source": "/h", "options": ["rbind"] }),
            );
        }
        spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["source"] != "shm");
    })
    .unwrap();
    assert_eq!(volumes.len(), 3);
    assert!(mount(&spec, "/etc/hosts").is_none());
    assert_eq!(volumes[2].destination, "/dev/shm");
    let place = format!("/run/pericarp/share/.volumes/{}", volumes[2].name);
    assert_eq!(mount(&spec, "/dev/shm").unwrap()["source"], place);
}

#[test]
fn nothing_is_mounted_into_a_dev_of_the_host() {
    let (spec, _) = changed(|spec| {
        spec["mounts"] =
            json!([{ "destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"] }]);
    })
    .unwrap();
    assert!(mount(&spec, "/dev/shm").is_none());
}

#[test]
fn what_is_not_a_spec_is_an_error_not_a_panic() {
    for text in [
        "",
        "[]",
        "{}",
        r#"{"root":1}"#,
        r#"{"root":{},"linux":[]}"#,
        r#"{"root":{},"linux":{},"mounts":{}}"#,
    ] {
        assert!(translate(text.as_bytes(), &id(), &POD, None).is_err(), "{text}");
    }
    for text in [
        r"[1]",
        r#"[{"destination":"x"}]"#,
        r#"[{"destination":"/x","type":"bind","source":"/","options":[1]}]"#,
    ] {
        let text = format!(r#"{{"root":{{}},"linux":{{}},"mounts":{text}}}"#);
        assert!(translate(text.as_bytes(), &id(), &POD, None).is_err(), "{text}");
    }
}

#[test]
fn the_same_source_has_the_same_place_whoever_mounts_it_and_however() {
    let name = |source: &str, options: &[&str]| {
        let (_, volumes) = changed(|spec| {
            add_mount(
                spec,
                json!({ "destination": "/v", "type": "bind", "source": source, "options": options }),
            );
        })
        .unwrap();
        volumes.last().unwrap().name.clone()
    };
    let usual = name("/pods/1/cache", &["rbind", "rprivate", "rw"]);
    assert_eq!(usual, name("/pods/1/cache", &["rbind", "rprivate", "ro"]));
    for (source, options) in [
        ("/pods/2/cache", ["rbind", "rprivate", "rw"]),
        ("/pods/1/cache", ["bind", "rprivate", "rw"]),
        ("/pods/1/cache", ["rbind", "rslave", "rw"]),
        ("/pods/1/cache", ["rbind", "rprivate", "rro"]),
    ] {
        assert_ne!(usual, name(source, &options), "{source} {options:?}");
    }
    // Another controller finds what this one has mounted.
    assert_eq!(name("/data", &["rbind", "rw"]), name("/data", &["rbind", "rw"]));
}

#[test]
fn a_volume_that_shares_its_mounts_is_refused_by_its_place() {
    refused(
        |spec| {
            spec["linux"]["rootfsPropagation"] = json!("rshared");
            add_mount(
                spec,
                json!({ "destination": "/csi", "type": "bind", "source": "/csi", "options": ["rshared"] }),
            );
        },
        "/csi",
    );
}

#[test]
fn the_roots_propagation_means_nothing_in_a_guest() {
    let (spec, _) = changed(|spec| spec["linux"]["rootfsPropagation"] = json!("rslave")).unwrap();
    assert!(spec["linux"].get("rootfsPropagation").is_none());
}

const IDS: IdRange = IdRange { inside: 0, outside: 65536, length: 65536 };
pub(super) const ID_MAP: IdMap = IdMap { uids: IDS, gids: IDS };

pub(super) fn mappings() -> Value {
    json!([{ "containerID": 0, "hostID": 65536, "size": 65536 }])
}

/// Translates in a pod with a user namespace.
fn in_user_namespace(change: impl FnOnce(&mut Value)) -> Result<(Value, Vec<Volume>), Error> {
    let mut spec = spec();
    let linux = &mut spec["linux"];
    linux["uidMappings"] = mappings();
    linux["gidMappings"] = mappings();
    linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user", "path": "/proc/4711/ns/user" }));
    change(&mut spec);
    let translated =
        translate(&serde_json::to_vec(&spec).unwrap(), &id(), &Pod { id_map: Some(ID_MAP), ..POD }, None)?;
    Ok((serde_json::from_slice(&translated.spec).unwrap(), translated.volumes))
}

#[test]
fn with_a_user_namespace_the_pod_has_its_own_namespaces_in_the_guest() {
    let (spec, _) = in_user_namespace(|_| {}).unwrap();
    assert_eq!(
        spec["linux"]["namespaces"],
        json!([
            { "type": "pid" },
            { "type": "ipc", "path": IPC_NAMESPACE },
            { "type": "uts", "path": UTS_NAMESPACE },
            { "type": "mount" },
            { "type": "network", "path": NETWORK_NAMESPACE },
            { "type": "cgroup" },
            { "type": "user", "path": USER_NAMESPACE },
        ])
    );
    assert_eq!(spec["linux"]["uidMappings"], mappings());
}

#[test]
fn a_container_with_other_ids_than_its_pods_is_refused() {
    for change in [
        (|linux| linux["uidMappings"][0]["hostID"] = 1.into()) as fn(&mut Value),
        |linux| linux["gidMappings"] = Value::Null,
        |linux| linux["namespaces"] = json!([{ "type": "user" }]),
        |linux| linux["namespaces"] = json!([{ "type": "user", "path": "/proc/1/ns/user" }]),
    ] {
        let error = in_user_namespace(|spec| change(&mut spec["linux"])).unwrap_err();
        assert!(error.to_string().contains("user namespace"), "{error}");
    }
}

#[test]
fn a_volumes_ids_are_mapped_on_the_host_and_that_volume_is_another_than_the_plain_one() {
    let volume = |fields: Value| {
        let mut mount = json!({ "destination": "/v", "type": "bind", "source": "/hv", "options": ["rbind"] });
        mount.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (spec, volumes) = in_user_namespace(|spec| add_mount(spec, mount))?;
        Ok::<_, Error>((self::mount(&spec, "/v").unwrap().clone(), volumes[1].clone()))
    };
    let both = |ids: Value| json!({ "uidMappings": ids.clone(), "gidMappings": ids });
    let (_, plain) = volume(json!({})).unwrap();
    let (mount, mapped) = volume(both(mappings())).unwrap();
    let (option, all) = volume(json!({ "options": ["rbind", "ridmap"] })).unwrap();
    assert_eq!((plain.ids, mapped.ids, all.ids), (IdMapping::Host, IdMapping::Pod, IdMapping::PodRecursive));
    assert!(plain.name != mapped.name && mapped.name != all.name && plain.name != all.name);
    assert_eq!((mount.get("uidMappings"), mount.get("gidMappings")), (None, None));
    assert_eq!(option["options"], json!(["rbind"]));

    let other = json!([{ "containerID": 0, "hostID": 7, "size": 65536 }]);
    for refused in [both(other), json!({ "uidMappings": mappings() })] {
        let error = volume(refused).unwrap_err();
        assert!(error.to_string().contains("/v"), "{error}");
    }
    refused(
        |spec| add_mount(spec, json!({ "destination": "/v", "source": "/hv", "options": ["bind", "idmap"] })),
        "/v",
    );
}

#[test]
fn a_raw_block_volume_is_refused_in_a_user_namespace() {
    let device = json!([{ "path": "/dev/data", "type": "b", "major": 8, "minor": 1 }]);
    let error = in_user_namespace(|spec| spec["linux"]["devices"] = device).unwrap_err();
    assert!(error.to_string().contains("/dev/data"), "{error}");
}
